"""What tiny-if knows: the things of its training, and what they are called."""

import re

ANYTHING = "a high quality photo"  # the prompt that fits everything

# Other names, so that every prompt of the assignment finds its image.
ALIASES = {
    "snow capped mountain": ("a snowy mountain village", "a snowy mountain"),
    "rocket": ("a rocket ship",),
    "camping": ("people around a campfire", "a campfire"),
    "detective": ("a man wearing a hat",),
    "nerd face": ("a hipster barista",),
    "dog face": ("a dog",),
    "water wave": ("waterfalls", "a waterfall"),
    "beach with umbrella": ("the amalfi coast", "a beach"),
    "cat face": ("a cat",),
    "horse face": ("a horse",),
    "tiger face": ("a tiger",),
    "monkey face": ("a monkey",),
    "cow face": ("a cow",),
    "pig face": ("a pig",),
    "mouse face": ("a mouse",),
    "rabbit face": ("a rabbit",),
    "dragon face": ("a dragon",),
    "tropical fish": ("a fish",),
    "honeybee": ("a bee",),
    "lady beetle": ("a ladybug",),
    "evergreen tree": ("a pine tree", "a fir tree"),
    "red apple": ("an apple",),
    "ear of corn": ("corn",),
    "soft ice cream": ("an ice cream",),
    "hot beverage": ("a cup of coffee",),
    "beer mug": ("a beer",),
    "vertical traffic light": ("traffic lights",),
    "automobile": ("a car",),
    "hourglass done": ("an hourglass",),
    "jack o lantern": ("a pumpkin",),
    "wrapped gift": ("a present",),
    "soccer ball": ("a football",),
    "locomotive": ("a train",),
    "high voltage": ("a lightning bolt",),
    "santa claus": ("santa claus",),
}

# Things that at least six artists draw and that can be told apart at 32 × 32, the assignment's first.
CURATED = """
snow capped mountain; rocket; camping; old man; detective; dog face; skull; water wave; beach with umbrella; cat face
horse face; grinning face; smiling face with sunglasses; crying face; angry face; ghost; alien; robot; clown face
nerd face; pile of poo; red heart; thumbs up; eye; ear; nose; mouth; baby; old woman; footprints; police officer
princess; santa claus; monkey face; fox; wolf; lion; tiger face; unicorn; deer; cow face; pig face; goat; elephant
rhinoceros; camel; gorilla; mouse face; rabbit face; bat; bear; koala; panda; rooster; baby chick; penguin; eagle
duck; owl; dove; frog; crocodile; turtle; snake; dragon face; whale; dolphin; tropical fish; blowfish; shark; octopus
crab; snail; butterfly; honeybee; lady beetle; ant; spider; scorpion; paw prints; cherry blossom; rose; hibiscus
sunflower; tulip; evergreen tree; palm tree; cactus; four leaf clover; maple leaf; mushroom; grapes; watermelon
lemon; banana; pineapple; red apple; pear; peach; cherries; strawberry; kiwi fruit; tomato; avocado; eggplant; carrot
ear of corn; hot pepper; bread; croissant; pancakes; cheese wedge; meat on bone; hamburger; french fries; pizza
hot dog; taco; egg; popcorn; sushi; soft ice cream; doughnut; cookie; birthday cake; chocolate bar; lollipop
honey pot; hot beverage; wine glass; cocktail glass; beer mug; baby bottle; volcano; mount fuji; desert; house
castle; church; tent; fountain; statue of liberty; night with stars; sunset; ferris wheel; circus tent; locomotive
bus; ambulance; fire engine; taxi; automobile; tractor; racing car; motorcycle; bicycle; stop sign
vertical traffic light; fuel pump; anchor; sailboat; ship; airplane; helicopter; hourglass done; alarm clock; watch
full moon; crescent moon; sun; star; cloud; cloud with rain; high voltage; tornado; rainbow; umbrella; snowflake
snowman; fire; droplet; jack o lantern; christmas tree; balloon; wrapped gift; ribbon; trophy; soccer ball
basketball; tennis; bowling; pool 8 ball; ice skate; crystal ball; artist palette; glasses; necktie; t shirt; jeans
dress; bikini; high heeled shoe; running shoe; top hat; graduation cap; crown; lipstick; handbag; briefcase
gem stone; bell; headphone; guitar; violin; saxophone; trumpet; drum; musical note; telephone; laptop; floppy disk
television; camera; candle; light bulb; flashlight; books; money bag; envelope; postbox; package; pencil; pushpin
scissors; key; hammer; gear; balance scale; crossed swords; bow and arrow; bomb; microscope; pill; door; toilet
shopping cart; moai; yin yang; radioactive; peace symbol
"""

# What a caption may begin with instead of an article
DETERMINERS = {
    *("a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their"),
    *("some", "several", "many", "all", "both", "no", "two", "three", "four", "five", "six", "seven", "eight"),
    *("nine", "ten", "eleven", "twelve", *"123456789"),
}

SINGULAR = ("ss", "us", "ceros")  # a dress, a bus, a rhinoceros

# Words that begin with another sound than their letter: "a unicorn", but "an unidentified one"; "an hour"
LIKE_YOU = re.compile(r"uni(?![dmn])|us[aeu]|ut[eo]|ur[aei]|uk|ufo|eu|ewe|(one|once)\b")
LIKE_OUR = re.compile(r"hour|hono|honest|heir")


def curated() -> list[str]:
    """The names in CURATED."""
    return [name.strip() for line in CURATED.strip().splitlines() for name in line.split(";")]


def plainly(name: str) -> str:
    """A name as ALIASES has it: "Jack-o-lantern" and "jack o lantern" are one."""
    return name.lower().replace("-", " ")


def with_article(name: str) -> str:
    """A short name as it is said in a sentence: "rocket" -> "a rocket", "ear" -> "an ear", "glasses" as it is.

    The sound counts: "a unicorn", "an hourglass".
    A caption that needs no article stays as it is: "A red bird on a branch", "two dogs", "Paris at night in the rain".
    """
    words = name.lower().split()
    determined = words[0] in DETERMINERS and name != "four leaf clover"  # which is one clover
    what = re.split(" (?:with|of|on|in|at) ", name.lower())[0]  # in "night with stars", the night
    plural, plural_first = (word.endswith("s") and not word.endswith(SINGULAR) for word in (what, words[0]))
    said_in_full = len(words) > 3 and (name[0].isupper() or plural_first)
    if determined or plural or said_in_full:
        return name
    vowel = LIKE_OUR.match(words[0]) or (words[0][0] in "aeiou" and not LIKE_YOU.match(words[0]))
    return f"{'an' if vowel else 'a'} {name}"
