"""Writes the short stories on which test/model/train.py trains model.bin.

A story is drawn from a small world: a hero, a friend, an elder, a place, a sky, a thing, and one
of the PLOTS below, which says what goes wrong, what is tried, who helps and how it ends. Who and
where are drawn once per story, so that names, pronouns, places and objects stay the same in it;
every sentence has several wordings, so that no two stories are alike.

All sentences are our own. The generator needs only the standard library; the same seed gives
the same stories.

    from stories import Storyteller
    teller = Storyteller(seed=1)
    print(teller.story())

    python3 test/model/stories.py 3 --seed 7      # print three stories
    python3 test/model/stories.py --measure 5000  # how varied are they?

The template language:
    [a|b|c]   one of the wordings, drawn each time; they nest, and one may be empty
    {slot}    a slot of this story (drawn once), or else a wording from PHRASES (drawn each time)
    ^         makes the next letter a capital, where the sentence rule cannot see that it must
"""
import argparse
import functools
import random
import re

# ---------------------------------------------------------------------------------------------
# The template language

TOKEN = re.compile(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+")


@functools.lru_cache(maxsize=None)
def parse(template):
    """A template as a tuple of parts: str, ("slot", name) or ("choice", (parts, parts, ...))."""
    stack = [[[]]]  # open choices; each is a list of alternatives, each a list of parts
    for token in TOKEN.findall(re.sub(r"\s+", " ", template)):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]":
            options = tuple(tuple(option) for option in stack.pop())
            stack[-1][-1].append(("choice", options))
        elif token[0] == "{":
            stack[-1][-1].append(("slot", token[1:-1]))
        else:
            stack[-1][-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"unbalanced template: {template}")
    return tuple(stack[0][0])


def expand(parts, rng, slots):
    """The text of parsed parts; a slot's own text is a template again."""
    text = []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        elif part[0] == "choice":
            text.append(expand(rng.choice(part[1]), rng, slots))
        else:
            wording = slots[part[1]] if part[1] in slots else PHRASES[part[1]]
            text.append(expand(parse(wording), rng, slots))
    return "".join(text)


SPACES = re.compile(r"[ ]+")
SPACE_BEFORE_MARK = re.compile(r" +([,.!?])")
SENTENCE_START = re.compile(r'(^|[.!?] |\n)("?)([a-z])')
# What follows a quotation is a new sentence, except "... he said" after an exclamation or question.
AFTER_QUOTE = re.compile(r'(\."|[!?]"(?! (?:[\w.]+ ){0,5}?'
                         r"(?:said|asked|cried|called|shouted|whispered|thought|added)\b)) ([a-z])")
SAID_I = re.compile(r'" (said|asked|cried|whispered|thought) (I|we)\b')
DOUBLE_END = re.compile(r'([.!?]")\.')
FORCED_CAPITAL = re.compile(r"\^(\"?)(\w)")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|uni|use)")


def polish(text):
    """Spaces, articles and capitals: the rules that templates need not think about."""
    text = SPACES.sub(" ", text).replace(" \n", "\n").replace("\n ", "\n").strip()
    text = SPACE_BEFORE_MARK.sub(r"\1", text)
    text = ARTICLE.sub(r"\1n ", text)
    text = FORCED_CAPITAL.sub(lambda m: m[1] + m[2].upper(), text)
    text = SAID_I.sub(r'" \2 \1', DOUBLE_END.sub(r"\1", text))
    text = AFTER_QUOTE.sub(lambda m: m[1] + " " + m[2].upper(), text)
    return SENTENCE_START.sub(lambda m: m[1] + m[2] + m[3].upper(), text)


# ---------------------------------------------------------------------------------------------
# The world: who, where, what

GIRLS = """Lily Mia Anna Ella Rose Nora Zoe Clara Emma Lucy Ruby Ivy Maya Sara Alice Daisy Eva
Hana Iris June Kate Leila Molly Nina Olive Penny Sophie Tara Wendy Amy Sue Jane Mary Bella Grace
Hope Lena Freya Elsa Greta Amina Yuki Priya""".split()
BOYS = """Tom Ben Max Sam Leo Jack Tim Noah Finn Oscar Peter Hugo Adam Billy Charlie David Eli
Felix George Henry Ivan Jonas Karl Luke Marco Nick Otto Paul Ravi Simon Theo Victor Will Toby
Omar Emil Anton Kenji Mateo John Bob Jim Joe""".split()
PETS = """Pip Bo Momo Tiki Coco Biscuit Pepper Fuzzy Button Hazel Nutmeg Pebble Bramble Clover
Twig Maple Bean Sunny Misty Rusty Patch Snowy Tuffy Ginger Acorn Berry Dot Mossy Poppy Rex Spot
Whiskers Puddle Fern Olly Zip Jojo Kiki Bubbles Cookie""".split()

# Made-up names teach the model to copy a name that it has never seen.
NAME_STARTS = "B Br D F Fl G H J K L M N P Qu R S T Tr V W Z Sh Al El Or Ar".split()
NAME_MIDDLES = "a e i o u ee oo ai an er il ol im un".split()
NAME_ENDS = "bo na li ko mi do ra ti lo my za x k rik lin do ga bby ppo tta ster bert".split()

ANIMALS = """fox rabbit bear hedgehog mouse squirrel cat dog kitten puppy frog duck owl turtle pig
goat lamb deer badger mole raccoon beaver otter penguin elephant monkey lion tiger horse pony donkey
cow hen wolf sparrow crow goose hamster panda koala kangaroo bat snail bee""".split()
FIGURES = [  # heroes who are neither children nor animals: (kind, pronoun or "" for either)
    "robot", "dragon", "snowman", "giant", "fairy", "wizard", "witch", "king", "queen",
    "prince", "princess", "knight", "pirate", "farmer", "baker", "fisherman", "toymaker",
    "clockmaker", "ghost", "elf", "train", "toy soldier", "unicorn", "sailor", "gardener",
    "monster", "troll", "scarecrow", "tailor", "painter", "man", "woman", "cloud", "star", "boat"]
PRONOUN_OF = {"king": "he", "prince": "he", "wizard": "he", "fisherman": "he", "snowman": "he",
              "man": "he", "toy soldier": "he", "queen": "she", "princess": "she", "witch": "she",
              "woman": "she", "fairy": "she", "knight": "he", "pirate": "he"}
MODS = {
    "child": "little young kind curious brave quiet cheerful shy clever small happy".split(),
    "animal": """little small young brown grey clever curious shy brave tiny hungry cheerful sleepy
        white playful friendly old fluffy""".split(),
    "figure": "old kind lonely little friendly gentle young small tired rusty poor merry".split(),
}
PRONOUNS = {
    "he": dict(he="he", him="him", his="his", self="himself"),
    "she": dict(he="she", him="her", his="her", self="herself"),
    "it": dict(he="it", him="it", his="its", self="itself"),
    "they": dict(he="they", him="them", his="their", self="themselves"),
    "I": dict(he="I", him="me", his="my", self="myself"),
    "we": dict(he="we", him="us", his="our", self="ourselves"),
}

HOMES = {
    "child": """[a small house by the sea|a cottage at the edge of the forest|a tall house on a hill
        |a white house near the river|a flat above the bakery|a farm outside the village
        |a little house with a green door|a red house with a big garden|a town by the lake]""",
    "animal": """[a burrow under the hill|a cozy den|a hollow tree|a nest of leaves and moss
        |a hole under an old oak|a barn behind the farm|a snug little house made of sticks
        |the reeds by the pond|a cave with a view of the valley|a quiet forest]""",
    "figure": """[a small house on the hill|an old tower|a hut beside the road
        |a workshop full of dust|a shed behind the mill|a house at the end of the lane
        |a stone cottage near the sea|a little room under the roof|a castle on a hill]""",
}
REGION = """[a small village|a quiet village by the river|a little town|a green valley
    |a village between two hills|a town with red roofs|a faraway land|a big forest
    |a village near the sea|a land of hills and lakes]"""

# name, preposition, what one sees there, hiding places, who lives there
PLACES = [
    ("beach", "at", "[the waves|the white gulls|the shining shells]",
     "[behind a tall rock|under an old boat|in a hole in the sand]", "crab gull seal turtle"),
    ("forest", "in", "[the tall trees|the soft moss|the dancing leaves]",
     "[under an old oak|inside a hollow log|behind a mossy stone]", "owl squirrel deer hedgehog"),
    ("meadow", "in", "[the yellow flowers|the tall grass|the butterflies]",
     "[in the tall grass|behind a hay bale|beside the wooden fence]", "mole rabbit lamb bee"),
    ("river", "by", "[the bright water|the smooth stones|the small fish]",
     "[under the wooden bridge|between two wet stones|among the reeds]", "otter frog duck beaver"),
    ("garden", "in", "[the red roses|the round pumpkins|the apple tree]",
     "[behind the watering can|under a big leaf|beside the garden wall]", "snail robin mouse cat"),
    ("park", "in", "[the swings|the old fountain|the chestnut trees]",
     "[under a bench|behind the fountain|below the slide]", "pigeon squirrel dog duck"),
    ("hill", "on", "[the whole valley|the tiny houses below|the wide sky]",
     "[behind a big stone|under a thorn bush|beside the crooked tree]", "goat hare crow sheep"),
    ("lake", "by", "[the calm water|the little boats|the water lilies]",
     "[under the old dock|behind a row of boats|in the soft mud]", "swan frog heron otter"),
    ("market", "at", "[the baskets of fruit|the bright tents|the busy people]",
     "[under an apple cart|behind a pile of sacks|beside the flower stall]",
     "cat dog donkey goose"),
    ("farm", "on", "[the golden fields|the sleepy cows|the big red barn]",
     "[under the hay|behind the barn|inside an empty bucket]", "hen pig cow horse"),
    ("mill", "by", "[the turning wheel|the white flour dust|the quiet stream]",
     "[behind a sack of flour|under the wooden stairs|beside the wheel]", "mouse cat donkey owl"),
    ("mountain", "on", "[the white snow|the deep valley|the grey rocks]",
     "[behind a snowy rock|in a small cave|under a pine tree]", "goat eagle bear fox"),
    ("castle", "at", "[the high towers|the colorful flags|the heavy gate]",
     "[behind a suit of armor|under the long table|beside the old well]", "dove mouse horse cat"),
]

COLORS = "red blue green yellow golden silver purple white orange pink brown black".split()
THINGS = """kite ball scarf hat drum book lantern basket bell whistle flute toy boat|mitten|marble
|music box|teddy bear|doll|spoon|umbrella|feather|ribbon|cup|cap|blanket|bag|stone|pencil|toy train
|necklace|ring|key|coat|wagon|shoe|button|shell|paintbrush|balloon|pillow"""
THINGS = THINGS.replace("toy boat", "toy_boat").replace("\n", "").split("|")
THINGS = [word.replace("_", " ") for item in THINGS for word in
          (item.split() if item.startswith("kite") else [item])]
SNACKS = """[a loaf of warm bread|a basket of apples|a big honey cake|a bag of cherries|a bowl of
    strawberries|a plate of pancakes|a jar of jam|a round cheese|a berry pie|a bag of nuts]"""
SKIES = {
    "sunny": "[the sun was shining|the sky was blue and wide|the sun warmed the roofs]",
    "rainy": "[rain tapped on the windows|the rain fell softly|grey clouds hung over the hills]",
    "windy": "[the wind shook the trees|the wind was blowing hard|leaves danced in the wind]",
    "snowy": "[snow was falling|white snow covered the ground|soft snow lay on every roof]",
    "foggy": "[a white fog lay over the fields|fog covered the road|the hills hid in the fog]",
    "warm": "[bees hummed in the flowers|the air smelled of grass|birds sang in the trees]",
    "cold": "[the grass was white with frost|ice shone on the puddles|the air was cold and clear]",
    "quiet": "[everything was still|not a leaf moved|only a bird was singing]",
    "bright": "[the light danced on the water|the sky had no clouds|the birds were singing]",
}

PHRASES = {
    "smiled": "[smiled|laughed|grinned|beamed]",
    "sadly": "[sadly|in a small voice|with a sigh|quietly]",
    "gladly": "[happily|with a smile|with a big smile|gladly]",
    "kindly": "[kindly|gently|softly|in a warm voice]",
    "thought": "[thought for a while|thought hard|sat down to think|thought about it]",
    "hurried": "[ran|hurried|rushed|walked quickly]",
    "suddenly": "[suddenly|all at once|just then|at that moment|in that moment]",
    "soon": "[soon|after a while|a little later|before long]",
    "thanks": "[thank you|thank you so much|thank you, my friend|oh, thank you]",
    "looked": "[looked around|looked left and right|looked everywhere]",
    "near_tears": "[a tear rolled down {his} cheek|{he} wanted to cry|{he} felt very small|{he} "
                  "did not know what to do|{he} felt a lump in {his} throat]",
    "glad_end": "[{he} had never been so happy|{he} felt warm inside|{he} felt as light as a "
                "feather|{he} could not stop smiling|{he} jumped for joy]",
    "night_end": "[that night, {H} slept well|that night, {H} fell asleep with a smile|when the "
                 "moon came up, {H} {was} already asleep|that evening, {H} told {G} the whole story"
                 "|at bedtime, {H} thought about the day and smiled]",
    "ever_after": "[and they stayed friends for a long, long time|and they were friends ever after"
                  "|and nobody ever forgot that day|and that is how it has been ever since"
                  "|and the story is still told today]",
}

# ---------------------------------------------------------------------------------------------
# How stories begin. {who}: "a little fox named Pip"; {H}: "Pip", "the fox"; {name}: "Pip".

OPENINGS = [
    "once upon a time, there {was} {who}. {he} lived in {home}.",
    "once upon a time, there {was} {who} who lived in {home}.",
    "once upon a time, in {region}, there lived {who}.",
    "once upon a time, {who} lived in {home}.",
    "once upon a time, {who} went for a walk {at_place}.",
    "once there {was} {who}. [Everyone liked {him}.|]",
    "there once {was} {who} who loved [{hobby}|to walk {at_place}].",
    "there {was} {who} in {region}. {he} lived in {home}.",
    "one day, {who} {was} walking {at_place}.",
    "one day, {name} went to the {place}. {sky}.",
    "one day, {who} woke up early. {sky}, and {he} wanted to go to the {place}.",
    "one {weather} {daytime}, {who} went to the {place}.",
    "one {weather} {daytime}, {name} {was} [playing|sitting|walking] {at_place}.",
    "in {region}, there lived {who}. {he} loved {hobby}.",
    "in {region} lived {who}. [All the neighbors knew {him}.|]",
    "deep in the [forest|woods|green forest], there lived {who}.",
    "far away, [beyond the hills|behind the blue mountains|across the sea], lived {who}.",
    "long ago, in {region}, there lived {who}.",
    "many years ago, {who} lived in {home}.",
    "high on a hill [stood a small house. {who} lived there|lived {who}].",
    "at the end of a [long|quiet|dusty] road lived {who}.",
    "near the {place} lived {who}. {he} loved {hobby}.",
    "{name} {was} {a_kind}. {he} lived in {home}.",
    "{name} {was} {a_kind} who loved {hobby}.",
    "{name} lived in {home}. {he} loved {hobby}.",
    "{name} lived in {region}, not far from the {place}.",
    "{name} loved {hobby}. [{he} did it every day.|Nothing made {him} happier.|]",
    "{name} went to the {place}. {sky}, and {he} looked at {sight}.",
    "{name} went to the {place} [one {weather} {daytime}|on a {weather} {daytime}].",
    "{name} and {G} went to the {place}. {sky}.",
    "{name} woke up [early|with the sun|very early]. {sky}.",
    "{name} sat {at_place} and looked at {sight}.",
    "{name} had [a big dream|a good heart|many ideas|a busy life]. {he} lived in {home}.",
    "it was a {weather} {daytime}. {sky}. {name} {was} {at_place}.",
    "it was a {weather} {daytime} in {region}. {sky}.",
    "it was [Monday|Sunday|Saturday|Friday] {daytime}, and {sky}. {name} {was}"
    " [bored|happy|at home].",
    "it was [spring|summer|autumn|winter] in {region}, and {who} {was} [busy|happy|glad].",
    "{sky}. {name} put on {his} [hat|scarf|boots] and went out.",
    "{sky}, and {who} {was} walking {at_place}.",
    "the {weather} {daytime} had just begun. {name} {was} already awake.",
    "the sun was [shining|coming up|going down] over {the_region}. {who} {was} [on the way"
    " to|going to] the {place}.",
    "the wind was [blowing|singing|quiet] when {name} went to the {place}.",
    "every {daytime}, {name} walked to the {place} to see {sight}.",
    "every day, {who} walked {at_place}. {he} loved {hobby}.",
    "early one {weather} {daytime}, {name} left {home}.",
    "late one {daytime}, {name} {was} still {at_place}.",
    "on the first day of [spring|summer|winter|school|autumn], {name} [felt brave|got up early].",
    "on a {weather} {daytime}, {who} {was} {at_place}.",
    "everyone in {the_region} knew {name}. {he} {was} {a_kind} who loved {hobby}.",
    "when {name} {was} [small|very young|little], {he} lived in {home}.",
    "this is the story of {who}. {he} lived in {home}.",
    "do you know the story of {who}? [It began {at_place}.|Listen well.|]",
    "nothing ever happened in {region}, or so {name} thought.",
    "\"wake up, {call}!\" called {G}. {name} opened {his} eyes and looked out. {sky}.",
    "\"where are you going, {call}?\" asked {G}. \"To the {place},\" said {name}.",
    "\"what a {weather} day!\" said {name}. {he} went to the {place}.",
    "last [summer|winter|spring|week|year], {name} went to the {place}.",
    "yesterday, {name} went to the {place} with {G}.",
    "today was a special day for {name}. [{sky}.|]",
    "somewhere {at_place}, {who} {was} [humming a song|looking at {sight}].",
    "{who} lived in {home}. {he} loved {hobby}.",
    "{who} {was} walking {at_place} one {weather} {daytime}.",
    "the {kind} lived in {home}. {named}. [{he} loved {hobby}.|]",
    "the {kind} {was} {at_place}. {sky}.",
    "a [long|little] way from {the_region}, {who} lived in {home}.",
    "people say that {who} once lived in {home}. Here is what happened.",
    "not long ago, {who} moved to {home}.",
    "after [breakfast|lunch|school|the rain|dinner], {name} went to the {place}.",
    "before the sun came up, {name} {was} already {at_place}.",
    "",  # begin with the problem itself
    "",
]
OWN_OPENINGS = [  # told by "I" (or by "my brother and I")
    "when {name} {was} [six|seven|eight|small|little], {he} lived in {home}.",
    "last [summer|winter|spring|autumn], {name} went to the {place} with {G}.",
    "{name} will never forget that {weather} {daytime}. {sky}.",
    "{name} live in {region}. One {weather} {daytime}, {he} went to the {place}.",
    "{name} {was} {at_place} one {weather} {daytime}. {sky}.",
    "one day, {name} went to the {place}. {sky}.",
    "it was a {weather} {daytime}. {name} {was} {at_place}.",
    "let me tell you what happened {at_place} one {weather} {daytime}.",
    "yesterday, {name} woke up early. {sky}.",
    "{name} [always|have always] loved {hobby}.",
    "once, when {name} {was} {at_place}, {he} looked at {sight} for a long time.",
    "this happened {at_place}, on a {weather} {daytime}.",
    "",
]
MOOD_OPENINGS = [  # begin in the middle: the feeling first, then why
    "{name} {was} {mood} because {because}.",
    "{name} {was} very {mood}. {because}.",
    "{name} {was} [so|very] {mood} that {daytime}, because {because}.",
    "why {was} {name} so {mood}? It was because {because}.",
    "{name} felt {mood}. {because}.",
    "{name} could not [sleep|eat|smile|sit still] because {because}.",
    "\"why are you so {mood}, {call}?\" asked {G}. It was because {because}.",
    "{name} sat {at_place} and felt {mood}. {because}.",
    "it was a {weather} {daytime}, but {name} {was} {mood}. {because}.",
]
TRAITS = [
    "{he} {was} known for {his} [good heart|loud laugh|clever ideas|kind words].",
    "{he} [always wore|liked to wear] a {color2} [hat|scarf|ribbon].",
    "{sky}.",
    "{he} liked to look at {sight}.",
    "{he} loved {hobby}.",
    "it was a {weather} {daytime}, and {sky}.",
    "{H} liked the {place} best of all.",
    "{he} {was} never bored, for there was so much to see.",
    "[most of all, {he}|{he} also] liked {hobby}.",
]
# What a beginning may mention, but not twice.
ONCE_ONLY = ["{sky}", "{hobby}", "{sight}", "{weather}", "liked"]
HOBBY = """[singing|making up songs|telling stories|counting the stars|baking bread|looking at
    clouds|climbing trees|collecting stones|picking flowers|drawing pictures|watching the birds
    |asking questions|dancing in the rain|fixing old things|playing by the water|reading books]"""

# ---------------------------------------------------------------------------------------------
# What happens. One line is one step of the story; a line that starts with "?" may be left out, an
# indented line continues the one above. {Ho} is the hero as an object ("me"), {HF} hero and friend.

PLOTS = []


def plot(name, mood, because, problem, middle, end, **own_slots):
    """Adds a plot; own_slots are drawn once per story, in the order in which they are written.

    An own slot a__b="x = y|z = w" draws two slots that belong together."""
    PLOTS.append(dict(name=name, mood=mood, because=because, own=own_slots,
                      parts=[step_lines(part) for part in (problem, middle, end)]))


def step_lines(text):
    """The lines of a plot's part, continuation lines joined."""
    lines = []
    for line in text.strip("\n").split("\n"):
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines


plot(
    "lost", "[sad|upset|worried|unhappy]",
    "{he} had lost {his} {color} {thing}",
    """
{H} had a {color} {thing}. [It was a gift from {G}|{he} took it everywhere|{G} had made it].
[One day|{suddenly}|That {daytime}], {he} [looked for it, but it was gone|saw that it was gone].
""", """
{he} looked [under the bed|behind the door|in every corner|on the shelf], but [it was not
 there|the {thing} was not there|{he} found only dust].
? [{near_tears}|"Where can it be?" {H} asked {sadly}|"Oh no, my {color} {thing}!" {H} cried].
then {he} [went back to|{hurried} to] the {place}, because {he} had [played|been] there [before
 |the day before]. {he} {looked}, but [it was no use|{he} saw only {sight}].
there {he} met {a_friend}. "[Why are you so sad|What is wrong|What are you looking for]?" asked
 {F}. "{I} lost {my} {color} {thing}," said {H}.
"[Do not worry|Do not give up]," said {F}. "[Two can look better than one|{I_F_help}]."
{HF} looked [near the path|on the left|up and down], and [then on the right|in all the dark
 places]. {they} found [an old shoe|a rusty nail|a broken cup|a funny stone], but no {thing}.
? "[Think|Think hard]," said {F}. "[Where did you sit|Where did you stop] the last time?"
 {H} {thought}. "[I know|I remember now]!" {he} said.
{suddenly}, {F} saw something {color} {spot}. "Look!" {fhe} called. It was the {thing}!
""", """
{H} [picked it up and held it tight|hugged the {thing} and then hugged {F}]. "{thanks}!" {he} said.
[the wind had carried it there|it had fallen out of {his} [pocket|bag]|a bird had dropped it
 there], and {nobody_saw}.
? {H} gave {F} {snack}, and {they} ate it together.
[from that day on, {H} took better care of {his} {thing}|from then on, {H} kept the {thing} in a
 safe place|after that, {H} and the {thing} were never apart|{H} had found the {thing}, and a
 friend as well].
? {night_end}.
""",
    nobody_saw="[nobody had seen it|no one had noticed|that was all]")

plot(
    "newcomer", "[lonely|sad|quiet|shy]",
    "{he} had nobody to play with",
    """
[{H} {was} lonely|{H} had no friend there|{H} had [many toys|a nice home], but no one to
 play with]. [{he} often talked to the birds|the days were long and quiet|{he} ate alone].
one day, [someone new came to the {place}|{he} heard a soft voice {at_place}]. It was {a_friend}.
""", """
{H} wanted to say hello, but [{he} {was} too shy|no word came out]. So {he} [hid|looked away].
{F} [sat down alone|was shy too] and [looked at {fhis} feet|looked at {sight}].
? "{I_wonder}," thought {H}.
the next day, {F} was there again. {fhe} was [trying to fly a kite|building a tower of stones
 |singing a song], but [it fell down|it went wrong] every time.
{H} took a deep breath and walked over. "[Hello|Hi]," {he} said {sadly}. "[May {I} help
 you|Do you need help]?"
{F} looked up and {smiled}. "[Oh yes, please|Yes, please]," {fhe} said. "I am {F_am}. I am new
 here, and I do not know anyone."
{they} [tried it together|tried again together]. The first time it went wrong, and {they}
 {laughed_group}. The second time it [worked|went well].
? {then_they} shared {snack} and talked until [the sun went down|it was dark|{G} called].
""", """
["Will you come back tomorrow?" asked {F}. "Of course," said {H}|"Are we friends now?" asked {F}.
 "Yes," said {H}. "Friends"].
[after that, {they} met {at_place} every day|from then on, {they} were always together].
{H} {was} not lonely anymore. [{he} had learned that one small word can be a beginning|{he} knew
 now that the other one is often shy too|it had only taken a little courage to say hello].
? {ever_after}.
""",
    laughed_group="[laughed|had to laugh|laughed out loud]",
    I_wonder="[maybe tomorrow|perhaps it is easy to be brave|what a nice voice]",
    then_they="[then {they}|afterwards {they}|later {they}]")

plot(
    "storm", "[afraid|scared|worried]",
    "a big storm was coming",
    """
{suddenly}, the sky [turned black|grew dark]. [A storm was coming|Thunder rolled over the hills].
the wind [pulled at the trees|howled] and the rain [began to fall|came down hard].
""", """
{H} wanted to run home, but [the road was under water|the bridge was gone|{he} could not see the
 way]. {near_tears}.
first {he} hid under [a big tree|a bush|an old cart], but [the rain came through|the wind was
 too strong|it was too cold there].
then {he} heard a voice. "[Over here|Come here|This way]!" It was {a_friend}. {fhe} was
 {in_shelter}.
{H} ran as fast as {he} could and [crawled inside|slipped inside]. It was [small|dark] but dry.
"{thanks}," said {H}. "[{I_am} so cold|{I_am} so wet]." {F} gave {him} [a warm blanket|half of
 {fhis} coat|some dry leaves to sit on].
? there was a loud bang, and {both} jumped. "[It is only thunder|It is only noise]," said {F}.
 "[It cannot hurt us here|Let us count until it is gone]."
{they} [told each other stories|sang songs|counted the lightning] and shared {snack}, and the
 storm [did not seem so bad anymore|grew smaller and smaller|moved away].
""", """
[at last|in the end], the rain stopped and the sun came out. There was a rainbow over the {place}.
[but a tree had fallen on {Fs} home|but the wind had broken the roof of {Fs} home]. "[Now {I} will
 help you|You helped {me}, so {I} will help you]," said {H}.
[{they} worked all day|{they} carried wood and stones], and [in the evening the home was as good
 as new|by night it was better than before].
[{H} {was} not afraid of storms after that|a storm is not so bad when you are not alone, {H}
 thought|and every time it thundered, {H} thought of {F} and smiled].
? {night_end}.
""",
    in_shelter="[in a small cave|in an old barn|under the roof of a hut|inside a hollow tree]")

plot(
    "promise", "[sorry|ashamed|sad]",
    "{he} had broken a promise",
    """
{H} had made a promise to {a_friend}. "{I} will [{task}]," {he} had said. "You can count on {me}."
but [that {daytime}|on that day], {H} [saw something fun {at_place}|began to play {at_place}|fell
 asleep in the sun] and forgot [all about it|everything].
""", """
{F} waited and waited. [{fhe} waited until it was dark|the sun went down, and still nobody came].
when {H} remembered, [the moon was already up|it was too late]. {he} {hurried} to {F}.
"[You forgot|You did not come]," said {F} {sadly}. [{fhe} turned away|{fhe} closed the door].
{H} felt terrible. {near_tears}. "[Saying sorry is not enough|A word is not enough]," {he} thought.
first {he} brought {F} {snack}. But {F} shook {fhis} head. "[I do not want a gift|That is not what
 I wanted]," {fhe} said. "I wanted you to keep your word."
{H} went to {G} and [told {ghim} everything|asked what to do]. "[A broken promise is mended by
 keeping the next one|Do what you said you would do]," said {G}.
so [the next morning|very early the next day], {H} got up before the sun. {he} [worked without a
 rest|did not stop to play|did not look left or right].
{he} did all that {he} had promised, and [a little more|then {he} swept the yard too].
""", """
when {F} [came out|woke up], {fhe} could not believe {fhis} eyes. "You did it!" {fhe} said.
"[{I_am} sorry that {I} forgot|{I_am} sorry]," said {H}. "{I} will not forget again."
{F} {smiled}. "[I forgive you|Then we are friends again]," {fhe} said.
[{H} kept {his} word from that day on|from then on, {H} made few promises, but {he} kept them all
 |after that, when {H} said yes, everyone knew it was a yes].
? {night_end}.
""",
    task="help you to paint the fence|water your flowers|help you to pick the apples"
         "|bring you wood for the winter|help you to mend the roof|feed your chickens")

plot(
    "sharing", "[hungry and cross|cross|unhappy]",
    "{he} did not want to share",
    """
{G} had given {Ho} {snack_fixed}. [It smelled so good|It was still warm|It was the best of all].
"[This is all for {me}|{I} will eat it alone]," thought {H}, and {he} [went to a quiet spot
 {at_place}|sat down {at_place}].
""", """
{soon}, {a_friend} came by. "[That smells good|That looks good]," {fhe} said. "[May I have a
 little|I
 have not eaten today]."
"[No|Sorry, no]," said {H}. "[There is not enough|It is {mine}]." {F} [went away sadly|lowered
 {fhis} head and went away].
{H} began to eat. But [it did not taste good anymore|every bite felt like a stone]. {he} thought
 of {Fs} [sad face|hungry eyes].
{suddenly}, [a gust of wind came and knocked it over|{H} slipped, and half of it fell into the
 mud|a cheeky crow took a big piece]. {near_tears}.
? "[Serves {me} right|Now {I} know how it feels]," {H} said.
then {F} came back. [{fhe} had found some berries|in {fhis} hands {fhe} had a small piece of bread].
 "[You look sad|I heard you]," said {F}. "[You can have half of mine|Let us share this]."
{H} {was} [surprised|ashamed]. "[Why do you share with {me}|Why are you so kind]?" {he} asked.
 "[Because
 food tastes better with a friend|Because nobody likes to eat alone]," said {F}.
so {H} cut what was left into [two equal parts|two pieces] and gave {F} the bigger one.
""", """
{they} ate together and {laughed}. [It was the best meal of the year|Even the crumbs tasted good].
[when {H} came home, {he} told {G} about it|later {H} told {G} what had happened]. {G} {smiled}.
 "[Now you know the secret|That makes me happy]," {ghe} said.
[from that day on, {H} always cut everything in two|after that, {H} never ate alone again|{H} had
 less than before, and yet {he} felt rich].
? {ever_after}.
""",
    snack_fixed=SNACKS, laughed="[laughed|talked|told jokes|sang]",
    mine="[all mine|not for you]")

plot(
    "race", "[nervous|excited|worried]",
    "the big race was the next day",
    """
[every year, there was a race {at_place}|there was going to be a big race {at_place}]. {H} wanted
 to win [the {color} {thing}|a {color} cup|first prize] more than anything.
but {H} {was} [not very fast|the smallest of all|slower than the others]. {a_friend_cap} was the
 fastest of all. "[You will never beat me|I always win]," said {F}.
""", """
{H} [trained every morning|ran up and down the hill every day]. The first time {he} fell. The
 second time {he} [ran out of breath|got a stone in {his} foot]. But {he} did not give up.
? "[Slow and steady|Step by step]," said {G}. "[Do not look at the others|Just keep going]."
on the day of the race, [everyone came to watch|the whole village was there]. "Ready, set, go!"
{F} ran ahead like the wind. {H} {was} [last|far behind]. {he} [kept going|did not stop].
then {H} heard a cry. {F} had [fallen into a ditch|hurt {fhis} leg|stepped into a hole]. [the
 others ran past|nobody else stopped].
{H} could see the finish. {he} could win now! But {he} [stopped|turned back]. "[Can you walk|Are
 you hurt]?" {he} asked.
"[Go on|Leave me]," said {F}. "You will lose!" "[It is only a race|A race can wait]," said {H}, and
 {he} helped {F} up.
slowly, [arm in arm|side by side], {they} walked to the finish. {they} came in last.
""", """
but everyone [clapped and cheered|cheered louder than ever]. {G} gave {them} {snack}. "[This is
 for the kindest runners|A good heart wins too]," {ghe} said.
"[I am sorry that I laughed at you|You are a true friend]," said {F}. "{thanks}."
[{H} did not win the race, but {he} won a friend|{H} had lost the race and {was} happy all the
 same|the next year, {they} ran together, and nobody cared who was first].
? {night_end}.
""",
    a_friend_cap="{a_friend}")

plot(
    "broken", "[worried|sad|afraid|ashamed]",
    "{he} had broken {Gs} {fragile}",
    """
{G} had [an old|a beautiful|a precious] {fragile}. [It stood on the shelf|It was older than the
 house]. "[Please be careful with it|Please do not touch it]," {ghe} always said.
but one {daytime}, {H} [{was} playing with a ball in the house|wanted to look at it up close
 |danced through the room]. Crash! The {fragile} fell down and broke.
""", """
{H} stood very still. {near_tears}. "[What have {I} done|Oh no]," {he} whispered.
first {he} [hid the pieces under the bed|pushed the pieces under the rug]. But [the secret felt
 heavy|{he} could not eat and {he} could not play].
{he} tried to [glue it alone|put it together alone], but [the pieces did not fit|the glue ran
 everywhere].
then {he} met {a_friend} and told {fhim} everything. "[You must tell the truth|Tell {ghim} the
 truth]," said {F}. "[It is hard, but only for a minute|A lie only grows]."
? "But [{ghe} will be angry|what if {ghe} is angry]," said {H}. "[Maybe|Maybe for a little
 while]," said {F}. "[I will come with you|I will wait for you at the door]."
so {H} went to {G} [with the pieces in {his} hands|with a beating heart]. "{I} broke your
 {fragile}," {he} said. "[{I_am} so sorry|{I_am} very sorry]."
{G} was quiet for a moment. Then {ghe} [put an arm around {him}|took the pieces]. "[I am sad about
 it, but I am glad that you told me|Things can break|Thank you for telling me]," {ghe} said.
{soon}, {they_G} sat at the table and glued it together, piece by piece.
""", """
[the {fragile} had a few cracks now|one could still see the cracks], but {G} [liked it even more
 than before|put it back on the shelf].
"[The cracks tell a story|Every crack is a memory]," {ghe} said and {smiled}.
[{H} felt light again|{H} had learned that the truth is lighter than a secret|from then on, {H}
 always told the truth at once].
? {night_end}.
""",
    fragile="[vase|clock|teapot|mirror|glass bowl|plate|music box|lamp]")

plot(
    "fear", "[afraid|scared]",
    "{he} {was} afraid of {fear}",
    """
[but {H} had a secret|there was only one problem|but one thing was hard for {Ho}]: {he} {was} afraid
 of {fear}. [The others laughed about it|{he} told nobody|{his} knees shook when {he} thought of
 it].
one {daytime}, {a_friend} asked, "[Will you come with me|Can you help me]? I left my {thing}
 {fear_place}."
""", """
"[{I} cannot|{I} do not think so]," said {H}. {he} [looked at the ground|turned red]. "{I_am}
 afraid."
{F} did not laugh. "[Everyone is afraid of something|I am afraid of spiders]," {fhe} said. "[Let
 us go one step at a time|We can go very slowly]."
they tried it. But after three steps, {H} [ran back|stopped and closed {his} eyes|turned around].
? {near_tears}. "[{I} will never be brave|{I_am} not brave]," {he} said.
"[Brave does not mean that you have no fear|You can be afraid and brave]," said {G}, who had
 heard it. "[It means that you go on anyway|Take a deep breath and sing a song]."
so {H} tried again. {he} held {Fs} hand and [counted to ten|sang {a_song}|took a deep breath].
one step, two steps, three steps. [{his} heart beat loudly|{he} {was} still shaking], but {he}
 went on. And then {they} were there!
{they} found the {thing} [right away|at once|after a short look]. "You did it!" {F} {shouted}.
""", """
{H} {looked_round}. [It was not so bad after all|It was even a little beautiful|{he} saw {nice}].
"[{I} did it|Look at {me}]!" {he} [shouted|said] {gladly}. {glad_end}.
[from that day on, {H} {was} only a little afraid|after that, {he} went there often, and each time
 it was easier|{H} {was} still afraid sometimes, but {he} knew what to do: one step, and then
 one more].
? {night_end}.
""",
    fear__fear_place="the dark = in the dark cellar|the dark = in the dark barn"
                     "|the deep water = on the other side of the water"
                     "|high places = at the top of the tower|high places = up in the tall tree"
                     "|the big dog = behind the gate of the big dog|the dark cave = in the cave"
                     "|the long tunnel = at the end of the tunnel|the attic = in the attic"
                     "|the old bridge = on the other side of the bridge"
                     "|the dark woods = in the dark woods",
    a_song="[a little song|{his} favorite song|an old song]", shouted="[shouted|called|cheered]",
    looked_round="[opened {his} eyes|looked around|stood still and looked]",
    nice="[a thousand stars|the small light of the window|how far the world goes]")

plot(
    "secret", "[excited|curious|restless]",
    "{he} had found a secret",
    """
one day, {H} found a [small|hidden|green|little] {door} {spot}. [Nobody knew about it|{he} had
 never seen it before].
{he} opened it and [looked inside|went in]. There was [a hidden garden|a tiny room full of books
 |a room full of lanterns|a path to a clear spring]. "[This is {my} secret|{I} will tell
 nobody]," {he} whispered.
""", """
every day {he} went there alone. At first it was [wonderful|like a dream]. But {soon} {H} [felt
 lonely there|had nobody to show it to].
one {daytime}, {a_friend} [followed {him}|saw {him} go]. "[Where do you go every day|What are you
 hiding]?" asked {F}.
"[Nothing|Nowhere]," said {H} and [turned red|looked away]. {F} [was hurt|went away sadly].
that night, {H} could not sleep. "[A secret is only half as nice alone|What is a treasure that
 nobody sees]?" {he} thought.
the next day, the {door} was stuck. {H} pulled and pushed, but [it would not open|it did not
 move]. {near_tears}.
there was only one thing to do. {he} {hurried} to {F}. "[{I} want to show you something|Can you
 help {me}]," {he} said. "[It is {my} secret|It is a secret], but now it can be ours."
{HF} pulled together. One, two, three! The {door} [flew open|opened with a loud creak].
""", """
"[It is beautiful|How wonderful]!" said {F}. [{Fs} eyes shone like stars|{F} could not stop
 looking].
{they} [cleaned it and put flowers everywhere|made a table out of a log and ate {snack} there].
[the secret was bigger now, because two of them kept it|from then on, it was their secret place,
 and it was never lonely again|{H} had thought that sharing makes a secret smaller, but it grew].
? {ever_after}.
""",
    door="[door|gate|hatch]")

plot(
    "gift", "[worried|thoughtful|sad]",
    "{he} had no gift for {Gs} birthday",
    """
[tomorrow was {Gs} birthday|{Gs} birthday was coming]. {H} wanted to give {ghim} [something
 special|the best gift in the world]. But {he} had no money.
""", """
first {he} went to [the shop|the market]. There was a {color} {thing} in the window. {H} counted
 {his} coins. [There were only two|It was not enough].
{he} tried to bake a cake, but [it burned black|it fell flat|the cat ate it].
then {he} tried to [paint a picture|write a song], but [the paint ran|{he} did not like it].
 {near_tears}.
then, {at_place}, {he} met {a_friend}. "[Why such a long face|What is the matter]?" asked {F}.
 {H} told {fhim} about the birthday.
"[What does {ghe} like most|What makes {ghim} happy]?" asked {F}. {H} {thought}. "[{ghe_cap} likes
 {likes}|I think {ghe} likes {likes}]," {he} said.
"[Then you do not need money|That costs nothing]," said {F} and {smiled}. {HF} [worked all
 afternoon|worked until it was dark].
{they} [gathered|looked for] all that {they} needed {at_place}, and {they} kept it a secret.
""", """
in the morning, {H} [took {G} by the hand|knocked on the door]. "Close your eyes," {he} said. "Now
 look!" There {was_were} {likes}, [all for {ghim}|more than {ghe} had ever seen].
{G} [put {ghis} hands on {ghis} heart|could not say a word]. "[This is the best gift of all|You
 made this for me]," {ghe} said.
[they all ate {snack} and danced|{F} came too, and they sang until late].
[{H} had learned that the best gifts cannot be bought|and {H} {was} the happiest of all, because
 giving is as nice as getting|nobody missed the {color} {thing}].
? {night_end}.
""",
    likes="[wild flowers|small lanterns|shells and colored stones|paper stars|sweet berries]",
    was_were="were", ghe_cap="^{ghe}")

plot(
    "skill", "[sad|angry|disappointed]",
    "{he} could not {skill}",
    """
[everyone could {skill}, but not {Ho_sub}|more than anything, {H} wanted to {skill}]. [But {he}
 did not know how|But every time {he} tried, it went wrong].
""", """
the first time, {he} [fell on {his} nose|made a big mess|gave up after a minute]. The others
 laughed. {near_tears}.
"[{I} will never learn it|It is too hard for {me}]," {H} said and [sat down {at_place}|kicked a
 stone].
{a_friend} had seen it all. "[I could not {skill} at first|It took me a whole year]," said {F}.
 "[Shall I show you|Do you want to try again]?"
{F} showed {Ho} how to begin. "[Start small|First slowly, then faster]," {fhe} said. "[Do not be
 afraid
 of mistakes|Mistakes are steps]."
on [Monday|the first day], it went wrong. On [Tuesday|the second day], it went a little better.
 [{H} wanted to stop, but {F} said, "One more time!"|{H} practiced until the stars came out].
? {G} brought {them} {snack}. "[I am proud of you already|You are growing]," {ghe} said.
then, one {weather} {daytime}, something [wonderful|new] happened. {H} tried it [once more|without
 thinking], and it worked!
"[{I} can {skill}|Look, {I} can {skill}]!" {he} shouted. {F} [clapped {fhis} hands|danced with joy].
""", """
[{H} showed it to everyone|everybody came to watch]. Even those who had laughed [said "Well done!"
 |clapped]. {glad_end}.
? "{thanks}," {he} said to {F}. "[You did it yourself|I only showed you the way]," said {F}.
[soon a small {kid} came to {Ho} and said, "I cannot {skill}." {H} {smiled}. "[Not yet|Let {me}
 show you]," {he} said|{H} had learned that "I cannot" only means "not yet"|and when something
 was hard after that, {H} said, "One more time!"].
? {night_end}.
""",
    skill="[swim|whistle|dance|sing|fly a kite|skate|read|paint|climb|ride a bike|juggle"
          "|row a boat|bake bread|play the flute]",
    kid="[boy|girl|mouse|duck|rabbit]")

plot(
    "rescue", "[worried|frightened|upset]",
    "someone was in trouble",
    """
{suddenly}, {H} heard a [cry|small voice]. "Help! Help!" [It came from the {place}|It was not far
 away].
{he} {hurried} to look. There was {a_friend}, and {fhe} was stuck {trap}. "[Please help me|I cannot
 get out]!" {fhe} cried.
""", """
"[Do not be afraid|Hold on]," said {H}. "{I} will get you out." {he} reached out {his} hand, but [it
 was too far|{he} could not reach {F}].
then {he} pulled with all {his} strength, but [{F} did not move|it was no use].
? [the sky was getting dark|the water was rising|it was getting cold]. "[Hurry|Please hurry],"
 {F} {whispered}.
{H} {thought}. Then {he} saw {tool}. "[{I} have an idea|{I} know what to do]!" {he} said.
{he} [took {tool_it} and brought it to {F}|pulled {tool_it} all the way]. "Hold on tight!" {he}
 called.
 It [slipped once|slipped]. It [slipped again|almost broke]. {H} [did not let go|held on].
one, two, three! With a great pull, {F} was free.
{they} sat on the ground and [breathed hard|laughed and cried at the same time]. "{thanks}," said
 {F}. "[You saved me|I thought nobody would come]."
""", """
{H} took {F} to {home_of}. {G} gave {them} {snack} and a warm blanket.
"[How can I thank you|What can I give you]?" asked {F}. "[Be {my} friend|Come and visit {me}],"
 said {H}.
[and so it was. {F} came every {daytime}, and {they} played {at_place}|the next day, {F} brought
 a {color} {thing} as a gift, and {they} played until dark|some time later, {H} fell into the
 same place, and who came to help? It was {F}].
[{H} {was} small, but {he} had done a big thing|everyone in {the_region} heard about it|one does not
 have to be big to help].
? {night_end}.
""",
    trap="[in a deep hole|in an old net|in the mud|between two rocks|under a fallen tree"
         "|on a thin branch above the water]",
    whispered="[whispered|said|called]", tool_it="it",
    tool="[a long branch|a strong rope|an old ladder|a long board]",
    home_of="[a warm place|the nearest house]")

plot(
    "lost_way", "[afraid|worried|lonely]",
    "{he} could not find the way home",
    """
{H} followed [a blue butterfly|a small bird|a white feather in the wind|a little stream] far from
 the path. When {he} stopped, [nothing looked the same|all the paths looked alike].
"[Where {am_I_hero}|Which way is home]?" {he} asked, but [nobody answered|only the wind answered].
""", """
{he} walked to the left and came to [a wall of thorns|a wide river]. {he} walked to the right and
 came to [a dark swamp|a steep rock]. {he} {was} lost.
? {near_tears}. [the sun went down|it grew dark], and [strange noises came from the bushes|the
 first star came out].
then {he} saw a small light. [It was a lantern|It came closer]. Behind the light was {a_friend}.
 "[Are you lost|Did you lose your way]?" asked {F}.
"[Yes|Yes, {I_am} lost]," said {H}. "{I} want to go home." "[I know every path|I can help you],"
 said {F}. "What can you see from your home?"
{H} {thought}. "[{I} can see {landmark}|From the window {I} see {landmark}]," {he} said.
"[I know where that is|Then it is this way]," said {F}. {they} walked over [a bridge|a hill] and
 through [a dark wood|a field of tall grass]. {H} held the lantern.
? {H} {was} tired. {F} gave {Ho} {snack} and told {Ho} a [funny|long] story, so the way
 felt shorter.
""", """
{soon}, {H} saw {landmark}. "[There it is|{I_am} home]!" {he} shouted.
{G} [was standing at the door|ran out of the house] and [hugged {him}|took {him} in {ghis} arms].
 "[I was so worried|I looked for you everywhere]," {ghe} said.
"[Stay and eat with us|Come in]," said {G} to {F}. So {F} stayed, and they all [ate warm soup|drank
 hot milk].
[after that, {H} never left the path without a friend|{F} gave {Ho} the lantern, and it stood in
 the window every night|{H} had lost the way and found a friend].
? {night_end}.
""",
    landmark="[the old mill|a tall tower|a hill with one tree|the church with the bell"
             "|a red barn|three tall trees]", am_I="{am_I_hero}")

plot(
    "seed", "[impatient|sad|disappointed]",
    "nothing grew from {his} seed",
    """
one day, {G} gave {Ho} a [tiny|small] seed. "[Take care of it|Plant it and wait]," {ghe} said.
 "[It is a surprise|One day you will see]."
{H} put the seed into the ground and [gave it water|sang to it]. The next morning, {he} {hurried}
 to look. There was nothing.
""", """
{he} waited one day. {he} waited two days. [Still nothing|Only brown earth]. "[It is broken|This
 seed is no good]," {H} said {sadly}.
{he} wanted to [dig it up|throw it away], but {a_friend} stopped {him}. "[Wait|Do not do that],"
 said {F}. "[It is working under the ground|Good things are slow]."
? "[How do you know|Are you sure]?" asked {H}. "[I was small once too|My garden taught me],"
 said {F}.
so {H} waited. {he} gave it water every morning. When it was hot, {he} [made a little roof|gave it
 shade]. When it was cold, {he} covered it with [leaves|straw].
then a [snail|crow|storm] came and [nearly ruined|almost broke] everything. {H} and {Fo} [built a
 small
 fence of sticks|put stones around it].
and then, one {weather} {daytime}, there was a green [tip|leaf]! {H} [danced around it|called {G}
 at once].
""", """
day by day, it grew. It grew as high as {his} knee, and then [higher than the fence|as high as
 the roof]. In the end, it was [a sunflower|an apple tree|a giant pumpkin|a rose bush].
"[You did not give up|You took good care of it]," said {G}. "[That was the surprise|I am proud of
 you]."
{H} shared [it with everyone|the seeds with {F}]. [The next year, there was a whole garden|And the
 next year, the {place} was full of flowers].
[{H} had learned to wait|and when somebody was in a hurry, {H} told them about the seed|good
 things need time, {H} thought, and a friend who says "wait"].
? {ever_after}.
""")

plot(
    "kindness", "[cold and tired|tired|hungry]",
    "{he} had given away {his} last piece of bread",
    """
{H} had only [a piece of bread|a little soup|one apple] left. {he} {was} just about to eat, when
 [there was a knock at the door|a stranger came by].
it was {a_friend}. {fhe} was [thin and cold|tired and wet]. "[I have walked so far|I have not eaten
 for two days]," {fhe} said.
""", """
{H} looked at {his} food. {he} {was} hungry too. But then {he} {smiled} and said, "[Sit down|Come
 in]. [You can have it|We can share]."
{F} ate and [got warm by the fire|stopped shaking]. "{thanks}," {fhe} said. "[I will not forget
 this|One day I will help you too]." Then {fhe} went away.
? the others laughed about {Ho}. "[Now you have nothing|How silly]," they said. {H} only {smiled}.
the winter came, and it was [long and hard|very cold]. {H} [fell ill|had no more wood|hurt {his}
 foot in the snow]. [Nobody came to help|{he} could not go out]. {near_tears}.
one night, there was a knock. {H} opened the door. There stood {F} with {friends_many}!
they had brought [wood and soup|bread and blankets]. "[You helped me, and now we help you|I told
 you that I would come back]," said {F}.
""", """
they [made a fire|cooked soup] and sang, and {soon} {H} {was} [warm and well|well again].
"[{I} do not know how to thank you|It is too much]," said {H}. "[You already did|It began with
 you]," said
 {F}.
[a little kindness had gone out into the world and come back bigger|{H} had given one piece of
 bread and got a hundred friends|from then on, no one in {the_region} ever passed a closed door
 without a knock].
? {ever_after}.
""",
    friends_many="[all {fhis} friends|ten of {fhis} friends|a big sled|{fhis} whole family]")

plot(
    "fib", "[ashamed|worried|sorry]",
    "{he} had told a lie",
    """
{H} liked to make jokes. One {daytime}, {he} ran to the {place} and shouted, "[A wolf|A fire|A
 giant]! Help!" [Everyone came running|All the neighbors came]. But there was nothing.
{H} laughed and laughed. "[It was only a joke|{I} tricked you]!" {he} said. The others [were angry
 |went home and shook their heads].
""", """
the next day, {he} did it again. [Again they came|A few of them came], and again there was nothing.
"[One day nobody will believe you|That is not funny]," said {G}. But {H} did not listen.
then, one {weather} {daytime}, {H} saw [smoke over a roof|a real fire in the hay]. It was the house
 of
 {a_friend}! "[Fire|Help]! Fire!" {he} shouted. This time it was true.
but [nobody came|nobody even looked up]. "[Another joke|You cannot trick us again]," they said.
 {near_tears}.
then {he} [rang the big bell|took a bucket and ran alone]. {he} carried
 water again and again, until {his} arms hurt.
at last {G} saw the smoke. "[It is true this time|Come quickly]!" {ghe} called. Then everyone came,
 and together they put out the fire.
""", """
{F} was safe. "[You saved me|Thank you]," {fhe} said to {Ho}.
but {H} [looked at the ground|hung {his} head]. "[{I_am} sorry for the lies|It was {my} fault that
 nobody came]," {he} said. "{I} will not do it again."
"[We believe you|Then we will trust you again]," said {G}. And {H} kept {his} word.
[a joke is only good when all can laugh, {H} had learned|from then on, {H} told the truth, and when
 {he} called, everyone came|it took some time, but in the end all trusted {Ho} again].
? {night_end}.
""")

plot(
    "noise", "[afraid|curious|nervous]",
    "there was a strange noise in the night",
    """
[that night|one night], {H} heard a strange noise. {noise}! [It came from the {noise_place}|It was
 somewhere in the {noise_place}]. {he} sat up in bed.
"[What was that|Who is there]?" {he} whispered. {noise_again}. [{his} heart beat fast|{he} pulled
 the
 blanket over {his} head].
""", """
first {he} thought that it was [a monster|a ghost|a thief]. {he} tried to sleep, but the noise [came
 back|did not stop].
{he} [woke {G}|called {G}], but when {ghe} came, everything was quiet. "[It was only a dream|It was
 only the wind]," {ghe} said.
but as soon as {G} was gone, there it was again. {noise}! "[{I} must find out|Now {I} want to
 know]," {H} said.
{he} took a [lantern|candle] and [walked on tiptoe|went step by step] to the {noise_place}. {he}
 opened the door very slowly.
there, [behind an old box|under a basket|in a pile of straw], sat {a_friend}. {fhe} was [shaking
 with cold|just as afraid as {Ho_than}].
"[Please do not be angry|Oh, do not shout]," said {F}. "[I was looking for a warm place|I got stuck
 in here when I followed a moth]."
{H} [began to laugh|laughed with relief]. "[And {I} thought you were a monster|You scared {me}]!"
 {he} said. "[I thought the same about you|I thought you were one]," said {F}.
""", """
{H} gave {F} {snack} and [a soft blanket|a place by the fire]. In the morning, {G} found them both
 asleep, [side by side|under one blanket].
"[So this was the monster|So that was the noise]," {ghe} said and {smiled}. "[{fhe_cap} can
 stay|Well,
 there is room for one more]."
[from then on, when something went bump in the night, {H} only said, "Good night, {F_name}!"|{H}
 had learned to look before {he} {was} afraid|most monsters, {H} knew now, are only cold and
 hungry].
? {ever_after}.
""",
    noise="[scratch, scratch|bump, bump|tap, tap, tap|squeak, squeak|knock, knock]",
    noise_place="[cellar|attic|shed|kitchen|barn|cupboard]",
    noise_again="[there it was again|then it was quiet, and then it came again]", fhe_cap="^{fhe}")

plot(
    "sick", "[worried|sad]",
    "{G} was ill",
    """
one morning, {G} did not get up. [{ghe} had a fever|{ghe} was ill]. "[I only need some
 rest|It is nothing]," {ghe} said, but {ghis} voice was weak.
"[{I} will help|{I} will get what you need]," said {H}. {G} needed [tea made from the silver flower
 |honey from the wild bees|water from the cold spring], and that was far away, on the other side of
 the {place}.
""", """
{H} [packed a bag|put on {his} warmest coat] and set out. The way was long. First {he} came to a
 [river without a bridge|high wall]. {he} could not get across, and {he} [wanted to turn back|sat
 down on a stone].
then {a_friend} came along. "[Where are you going|Why are you here all alone]?" asked {F}. {H} told
 {fhim} about {G}.
"[Climb on my back|I know a way]," said {F}. [{they} crossed slowly and carefully|{F} showed {him} a
 hidden path], and {soon} {they} were on the other side.
next, {they} came to a dark [cave|wood]. {F} was afraid, but now {H} {was} the brave one. "[Hold my
 hand|Stay close to {me}]," {he} said.
and at last, there it was, [shining in the light|right in front of {them}]. {H} took only as much as
 {he} needed, and {they} {hurried} home.
""", """
{G} drank it [slowly|to the last drop] and fell asleep. {H} sat by the bed all night. [{F} kept the
 fire going|{F} waited by the door].
in the morning, {G} opened {ghis} eyes. [{ghis} face was rosy again|{ghe} {smiled}]. "[I feel much
 better|I am well again]," {ghe} said. "[You went so far for me|How brave you are]."
"[{I} was not alone|{I} had help]," said {H} and looked at {F}.
[they all ate {snack} together|that day there was {snack} for everyone]. [{H} knew now how strong
 love can be|{glad_end}|when you love someone, no way is too long].
? {ever_after}.
""")

plot(
    "building", "[excited|impatient|busy]",
    "{he} wanted to build {build}",
    """
one day, {H} had [a great idea|a wonderful idea]. {he} wanted to build {build}! [{he} drew a plan
 in the
 sand|{he} thought about it all night].
{he} [gathered wood and nails|found boards, rope and a hammer] and began to work, all alone. "{I} do
 not need help," {he} said.
""", """
but [the boards were too heavy|the hammer hit {his} thumb]. By noon, it [fell over with a crash
 |looked very crooked].
{H} tried again. This time [the rope broke|the wind knocked it down]. {near_tears}.
{a_friend} had been watching. "[Can I help|May I try something]?" {fhe} asked. "[No|No, thank you],"
 said {H}. "{I} can do it alone."
but after the third crash, {H} [sat down and sighed|put down the hammer]. "[Maybe {I} need help
 after all|Please help {me}]," {he} said.
{F} {smiled} and took the other end of the board. [{H} held, and {F} hammered|One held, and one
 tied the knots]. It was [much easier|almost easy] now.
? {G} came with {snack}. "[Many hands make light work|Well, look at that]," {ghe} said, and then
 {ghe} helped too.
at sunset, it was done. It was [a little crooked|not perfect], but it was strong.
""", """
{they} painted it {color} and [wrote both names on it|put a flag on top].
"{We_did_it}!" said {H}. "[Not {I}, we|All of us]," {he} added and {laughed_soft}.
[the next day, {they} {use_it}|all summer long, {they} {use_it}], and [everyone in {the_region}
 came to
 see it|it never fell down].
[{H} had learned that asking for help is not weak|what one cannot do, two can, {H} thought|and the
 next plan they drew together].
? {night_end}.
""",
    build="[a boat|a tree house|a bridge|a cart|a hut|a big swing|a raft]",
    We_did_it="[we did it|it is done]", laughed_soft="[laughed|smiled]",
    use_it="played there|met there|had fun with it")

plot(
    "wish", "[unhappy|bored|restless]",
    "{he} always wanted more",
    """
one {daytime}, {H} found a [strange|glowing|golden|magic] {magic} {spot}. When {he} touched it, a
 voice said, "[You have three wishes|I will give you three wishes]. [Use them well|Be careful]."
""", """
"[{I} wish for a mountain of cake|{I} wish for all the toys in the world]!" said {H} at once. [Poof!
 There it was|In a moment, it was there]. {he} [ate until {his} belly hurt|played until {he} {was}
 bored].
for the second wish, {he} said, "[^{I} wish to be the biggest of all|^{I} wish that everyone does
 what
 {I} say]." Now {he} {was} [big and strong|like a king], but [nobody dared to come near|nobody
 wanted to play].
{H} sat [alone|all alone] {at_place}. {near_tears}.
then {a_friend} came by. {fhe} was the only one who {was_not_afraid}. "[You look sad|Is something
 wrong]?" asked {F}. "{I} have everything," said {H}, "but {I_am} alone."
"[What do you really want|And what would make you happy]?" asked {F}. {H} {was} silent for a long
 time.
then {he} took the {magic} and said, "[^{I} wish that everything is as it was|Please make everything
 the way it was]." [Poof! It was gone|There was a flash, and all was as before].
""", """
the {magic} [turned to dust|was only a stone now]. {H} had no wishes left, but {he} {was} not sad.
"[Do you want to play|Shall we go to the {place}]?" asked {F}. "[Yes|Very much]," said {H}. "That is
 just what {I} wanted."
{they} [shared {snack} and looked at {sight}|played until the stars came out].
[{H} had learned that the best things do not come from magic|a friend is better than three wishes,
 {H} thought|and if {he} ever found another {magic}, {he} would leave it there].
? {night_end}.
""",
    magic="[lamp|ring|stone|shell|coin|bottle]",
    was_not_afraid="was not afraid")

plot(
    "useful", "[sad|lonely|gloomy]",
    "nobody needed {him} anymore",
    """
[nobody had any work for {Ho}|the others were faster and stronger than {Ho}]. "[You are too
 {weak} for this|You cannot do this]," they said. "[Go and play|Stay out of the way]."
{H} felt [useless|in the way]. {he} [went away sadly|sat alone {at_place}].
""", """
{he} tried to help [the baker|the farmer], but {he} dropped [the bread|the eggs]. {he} tried to
 help [the
 painter|the gardener], but {he} [spilled the paint|stepped on the flowers].
? {near_tears}. "[{I_am} good for nothing|Nobody needs {me}]," {he} said.
then {H} met {a_friend}, who was crying. "[My {thing} fell into a hole|My {color} {thing} is
 gone]," said {F}, "[down there, where it is too dark and narrow for all of us|and all the strong
 ones said that they had no time]."
"[Let {me} try|Maybe {I} can help]," said {H}. {he} [went slowly and looked with care|got down on
 the ground and listened].
[what the others could not do with strength, {H} did with patience|{he} took a long time, but {he}
 did not give up]. And {soon} {he} [came back|called out]. "{I} found it!" {he} said. In {his} hand
 was
 the {color} {thing}!
""", """
"{thanks}!" cried {F} and [hugged {him}|danced around {him}]. "[You are the best helper in the
 world|Nobody else could do that]!"
{soon} [everybody|everyone in {the_region}] heard about it. When something small was lost, or
 somebody was
 sad, they said, "[Let us ask {Ho_name}|We know who can help]."
? {G} gave {Ho} {snack}. "[I always knew it|I am proud of you]," {ghe} said.
[now {H} had work every day|{H} {was} never in the way again], and {glad_end}. [Everyone is good at
 something|One does not have to be fast and strong to be needed].
? {ever_after}.
""",
    weak="[small|slow|old|clumsy]")

# ---------------------------------------------------------------------------------------------
# Casting: who plays in this story

# Plots in which two heroes who act as one ("Tom and Mia") make sense.
PLOTS_FOR_TWO = set("""lost storm promise rescue lost_way noise gift secret broken sharing seed sick
building""".split())
RELATIVES = {"she": "mother grandmother aunt sister mom grandma".split(),
             "he": "father grandfather uncle brother dad grandpa".split()}
ELDERS = {
    "animal": [("the old owl", "he"), ("the wise turtle", "she"), ("old Mrs. Badger", "she"),
               ("old Mr. Crow", "he"), ("the old goat", "he"), ("the grey goose", "she")],
    "figure": [("the old baker", "he"), ("the woman next door", "she"), ("the miller", "he"),
               ("the teacher", "she"), ("old Mrs. Hill", "she"), ("old Mr. Brown", "he")],
    "child": [("the teacher", "she"), ("old Mrs. Hill", "she"), ("old Mr. Brown", "he"),
              ("the old gardener", "he")],
}
CALLS = "[little one|my dear|my friend|dear]"


class Storyteller:
    """Draws stories; two tellers with the same seed tell the same stories."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def story(self):
        """One story: one to three paragraphs, separated by newlines."""
        rng = self.rng
        chosen = rng.choice(PLOTS)
        slots = self.cast(chosen)
        problem, middle, end = [self.lines(part, slots) for part in chosen["parts"]]
        problem = self.beginning(slots) + problem
        separator = "\n" if rng.random() < 0.85 else " "
        return polish(separator.join(" ".join(part) for part in (problem, middle, end)))

    def text(self, template, slots):
        return expand(parse(template), self.rng, slots)

    def lines(self, part, slots):
        """The sentences of one part of a plot, some of the optional ones left out."""
        kept = [line for line in part if line[0] != "?" or self.rng.random() < 0.6]
        return ["^" + self.text(line.lstrip("? "), slots).lstrip() for line in kept]

    def beginning(self, slots):
        """The opening, and up to two sentences about the hero."""
        rng = self.rng
        mode = slots["voice"]
        if rng.random() < 0.15:
            opening = rng.choice(MOOD_OPENINGS)
        elif mode in ("I", "we"):
            opening = rng.choice(OWN_OPENINGS)
        elif mode == "mine":
            opening = rng.choice([each for each in OPENINGS if "{who}" not in each])
        else:
            opening = rng.choice(OPENINGS)
        if not opening:
            return []
        chosen = [opening]
        count = 1 + rng.choice([0, 0, 1, 1, 2])
        for trait in rng.sample(TRAITS, len(TRAITS)):
            told = {fact for fact in ONCE_ONLY if any(fact in each for each in chosen)}
            if len(chosen) < count and not any(fact in trait for fact in told):
                chosen.append(trait)
        return ["^" + self.text(each, slots) for each in chosen]

    def cast(self, chosen):
        """The slots of one story."""
        rng = self.rng
        place, preposition, sight, spot, locals_ = rng.choice(PLACES)
        weather = rng.choice(list(SKIES))
        slots = dict(
            place=place, at_place=f"{preposition} the {place}", sight=sight, spot=spot,
            region=REGION, weather=weather, sky=SKIES[weather], hobby=HOBBY, snack=SNACKS,
            daytime="[morning|afternoon|evening|day]", thing=rng.choice(THINGS),
            color=rng.choice(COLORS), color2=rng.choice(COLORS), mood=chosen["mood"],
            I_F_help="I will help you")
        for key in ("sight", "spot", "region", "sky", "hobby", "snack", "daytime", "mood"):
            slots[key] = self.text(slots[key], slots)
        slots["the_region"] = re.sub("^an? ", "the ", slots["region"])
        self.cast_hero(slots, chosen["name"] in PLOTS_FOR_TWO)
        self.cast_friend(slots, locals_.split())
        self.cast_elder(slots)
        self.name_the_group(slots)
        for key, template in chosen["own"].items():
            texts = self.text(f"[{template}]", slots).split(" = ")
            slots.update(zip(key.split("__"), texts))
        slots["because"] = chosen["because"]
        return slots

    def cast_hero(self, slots, may_be_two):
        rng = self.rng
        voice = rng.choices(["one", "two", "I", "we", "mine"],
                            [80, 12 if may_be_two else 0, 5, 2 if may_be_two else 0, 3])[0]
        sort = rng.choices(["child", "animal", "figure"], [42, 42, 16])[0]
        if voice in ("two", "I", "we"):
            sort = "child" if voice != "two" or rng.random() < 0.6 else "animal"
        if voice == "mine":
            sort = "animal"
        slots.update(voice=voice, sort=sort)
        {"one": self.hero_alone, "two": self.hero_of_two, "I": self.hero_told_by_self,
         "we": self.hero_told_by_self, "mine": self.hero_of_mine}[voice](slots)
        slots["home"] = self.text(HOMES[sort], slots)
        many = voice in ("two", "we")
        slots.update(was="were" if many else "was", Ho=slots.get("Ho", slots["H"]),
                     I="we" if many else "I", me="us" if many else "me", my="our" if many else "my",
                     I_am="we are" if many else "I am", am_I_hero="are we" if many else "am I",
                     Ho_sub="{Ho}", Ho_than=slots["name"], Ho_name=slots["call"])

    def hero_alone(self, slots):
        rng = self.rng
        pronoun, kind, name = self.character(slots["sort"])
        mod = rng.choice(MODS[slots["sort"]])
        slots.update(PRONOUNS[pronoun], kind=f"{mod} {kind}", a_kind=f"a {mod} {kind}", plain=kind)
        if slots["sort"] != "child" and rng.random() < 0.25:  # a hero without a name
            slots.update(name=f"the {mod} {kind}", H=f"[the {kind}|the {kind}|the {mod} {kind}]",
                         who=f"a {mod} {kind}", call=CALLS, named="everyone liked {him}")
            return
        others = f"|{name}|{name}|the {kind}" if slots["sort"] != "child" else ""
        slots.update(name=name, H=f"[{name}{others}]", call=f"[{name}|{name}|my dear]",
                     who=f"a {mod} {kind} [named|called] {name}", named=f"{{his}} name was {name}")

    def hero_of_two(self, slots):
        """Two heroes who do everything together."""
        rng = self.rng
        _, kind, first = self.character(slots["sort"])
        second = first
        while second == first:
            second = self.character(slots["sort"])[2]
        group = rng.choice(["friends", "children", "friends", "neighbors"])
        if slots["sort"] == "animal" and kind not in ("mouse", "deer", "goose", "fox", "wolf"):
            group = kind + "s"
            group = group.replace("ys", "ies").replace("onkies", "onkeys")
        both = f"{first} and {second}"
        slots.update(PRONOUNS["they"], kind=f"two {group}", a_kind=f"two {group}", plain=kind,
                     name=both, H=f"[{both}|{both}|the two {group}]",
                     named=f"they were called {both}",
                     who=f"two {group} [named|called] {both}", call=f"[you two|{both}]")

    def hero_told_by_self(self, slots):
        """The hero tells the story."""
        many = slots["voice"] == "we"
        other = self.rng.choice("my brother|my sister|my friend|my cousin".split("|"))
        if self.rng.random() < 0.3:
            other = "my friend " + self.character("child")[2]
        word = "we" if many else "I"
        slots.update(PRONOUNS[word], kind="child", a_kind="a child", plain="child", H=word,
                     Ho="us" if many else "me", name=f"{other} and I" if many else "I",
                     call="[you two|children]" if many else CALLS)

    def hero_of_mine(self, slots):
        """Somebody tells about their pet or toy."""
        rng = self.rng
        kind = rng.choice("dog cat dog kitten puppy rabbit horse hamster robot goat duck".split())
        pronoun, _, name = self.character("animal")
        slots.update(PRONOUNS[pronoun], kind=kind, a_kind=f"a {kind}", plain=kind)
        if rng.random() < 0.4:
            slots.update(name=f"my {kind}", H=f"[my {kind}|the {kind}]", call=CALLS,
                         named="everyone liked {him}")
        else:
            slots.update(name=f"my {kind} {name}", H=f"[{name}|{name}|my {kind}]", call=name,
                         named=f"{{his}} name was {name}")
        slots["who"] = slots["name"]

    def character(self, sort):
        """Draws (pronoun, kind, name)."""
        rng = self.rng
        pronoun = rng.choice(["he", "she"])
        if sort == "child":
            kind = "boy" if pronoun == "he" else "girl"
        elif sort == "animal":
            kind = rng.choice(ANIMALS)
        else:
            kind = rng.choice(FIGURES)
            pronoun = PRONOUN_OF.get(kind, pronoun)
            if kind in ("robot", "train", "cloud", "star", "boat") and rng.random() < 0.3:
                pronoun = "it"
        names = GIRLS if pronoun == "she" else BOYS
        draw = rng.random()
        if draw < 0.12:
            name = self.made_up_name()
        elif sort == "animal" and draw < 0.65:
            name = rng.choice(PETS)
        else:
            name = rng.choice(names)
        return pronoun, kind, name

    def made_up_name(self):
        rng = self.rng
        middle = rng.choice(NAME_MIDDLES)
        if rng.random() < 0.3:
            middle += rng.choice("lrnmt") + rng.choice("aeiou")
        return rng.choice(NAME_STARTS) + middle + rng.choice(NAME_ENDS)

    def cast_friend(self, slots, locals_):
        """Someone of another kind and with another name than the hero."""
        rng = self.rng
        while True:
            sort = rng.choices(["animal", "child", "figure"], [55, 32, 13])[0]
            pronoun, kind, name = self.character(sort)
            if sort == "animal" and rng.random() < 0.5:
                kind = rng.choice(locals_)
            same_pronoun = pronoun == slots["he"] and rng.random() < 0.6
            if kind != slots["plain"] and name not in slots["name"] and not same_pronoun:
                break
        mod = rng.choice([each for each in MODS[sort] if each not in slots["kind"].split()])
        words = PRONOUNS[pronoun]
        slots.update(fhe=words["he"], fhim=words["him"], fhis=words["his"])
        if sort != "child" and rng.random() < 0.3:
            slots.update(F=f"the {kind}", F_name="little one", a_friend=f"a {mod} {kind}",
                         F_am=f"a {kind}")
        else:
            refs = f"[{name}|{name}|{name}|the {kind}]"
            slots.update(F=refs, F_name=name, F_am=name,
                         a_friend=f"a {mod} {kind} [named|called] {name}")
        slots.update(Fs="{F}'s", Fo="{F}")

    def cast_elder(self, slots):
        """A grown-up or a wise neighbor; one of the family more often than not."""
        rng = self.rng
        pronoun = rng.choice(["he", "she"])
        if rng.random() < 0.7 or slots["voice"] in ("I", "we", "mine"):
            owner = "my" if slots["voice"] in ("I", "mine") else slots["his"]
            elder = f"{owner} {rng.choice(RELATIVES[pronoun])}"
        else:
            used = slots["kind"] + slots["a_friend"]
            elder, pronoun = rng.choice([each for each in ELDERS[slots["sort"]]
                                         if each[0].split()[-1].lower() not in used])
        words = PRONOUNS[pronoun]
        slots.update(G=elder, Gs=f"{elder}'s", ghe=words["he"], ghim=words["him"],
                     ghis=words["his"])

    def name_the_group(self, slots):
        """Hero and friend together."""
        voice = slots["voice"]
        told = voice in ("I", "we")
        words = PRONOUNS["we" if told else "they"]
        pair = {"one": "{H} and {F}", "mine": "{H} and {F}", "I": "{F} and I",
                "two": "[the three of them|all three]", "we": "[the three of us|all three of us]"}
        slots.update(they=words["he"], them=words["him"], their=words["his"], they_G=words["he"],
                     HF=pair[voice], both="both of us" if told else "both of them")
        if voice in ("two", "we"):
            slots["both"] = "all three"


# ---------------------------------------------------------------------------------------------
# Looking at the result

def measure(count, seed):
    """Prints how varied a sample is: distinct stories, first sentences and sentences."""
    teller = Storyteller(seed)
    texts = [teller.story() for _ in range(count)]
    sentences = [each for text in texts for each in re.split(r'(?<=[.!?]) |\n', text)]
    firsts = [re.split(r"(?<=[.!?]) |\n", text)[0] for text in texts]
    words = sorted(len(text.split()) for text in texts)
    print(f"{count} stories, {len(set(texts))} distinct")
    print(f"{len(sentences)} sentences, {len(set(sentences)) / len(sentences):.1%} distinct")
    print(f"{len(set(firsts)) / len(firsts):.1%} of first sentences are distinct")
    print(f"{len(set(' '.join(texts).split()))} distinct words, marks included")
    print(f"words in a story: {words[0]} to {words[-1]}, median {words[count // 2]}")


def main():
    parser = argparse.ArgumentParser(description="Prints generated stories.")
    parser.add_argument("count", type=int, nargs="?", default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--measure", type=int, metavar="STORIES")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.seed)
        return
    teller = Storyteller(arguments.seed)
    print("\n\n".join(teller.story() for _ in range(arguments.count)))


if __name__ == "__main__":
    main()
