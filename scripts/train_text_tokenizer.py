"""Train the text tokenizer that ships inside insula: `python scripts/train_text_tokenizer.py [directory]`.

Byte-level BPE with 2,048 entries, then 128 location tokens. The corpus is written here: a grammar of tabletop
instructions and questions, other household tasks, state bins 0 to 255, and common English. The same bytes every time.
"""

import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EMBEDDED = Path(__file__).resolve().parents[1] / "src" / "insula" / "tokens" / "embedded"
VOCAB_SIZE = 2048
LOCATIONS = 128
CONTROL = ["<pad>", "<eos>", "<bos>"]  # 0, 1, 2, as in Gemma

# What BPE may join into one token: a prompt's fixed phrases; a word, or up to three digits, with the space before it;
# punctuation with the newlines after it; blanks.
PIECES = r"Task:|, State:|;\nAction: | ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|\s+(?!\S)|\s+"


def words(text: str) -> list[str]:
    return text.split()


def names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]


COLORS = words("""
    red green blue yellow purple orange white black brown pink gray grey cyan silver
""")
THINGS = words("""
    block bowl cube cup mug plate pot pan lid bottle can box basket drawer cabinet door shelf rack stove burner
    sink tray table towel cloth sponge spoon fork knife spatula book apple banana carrot corn eggplant potato
    pepper tomato lemon mushroom strawberry ball toy bear duck brush marker pen pencil button switch lever handle
    peg ring tower drawer microwave kettle jar carton bag sock shirt lamp phone remote bin
""")
NAMED = names("""
    alphabet soup, cream cheese, salad dressing, barbecue sauce, tomato sauce, ketchup, butter, milk, orange
    juice, chocolate pudding, wine bottle, moka pot, frying pan, cookie box, ramekin, wooden cabinet, flat stove,
    desk caddy, coffee mug, rubber duck, paper towel, dish soap, trash can, cutting board, measuring cup, baking
    tray, wooden spoon
""")
PLACES = names("""
    left, right, middle, center, top, bottom, front, back, top drawer, middle drawer, bottom drawer, left side,
    right side, upper left corner, lower right corner, far edge, near edge
""")
TASKS = [
    "pick up the {c} {t} and place it in the {d} {u}",
    "pick up the {n} and place it in the {u}",
    "pick up the {t} between the {u} and the {n} and put it on the {v}",
    "put the {n} on top of the {t}",
    "put both the {n} and the {t} in the {u}",
    "move the {c} {t} to the {p} of the {u}",
    "move the {t} next to the {d} {u}",
    "slide the {t} towards the {p}",
    "push the {t} behind the {u}",
    "pull the {t} out of the {u}",
    "open the {p} of the {t}",
    "close the {t} and turn on the {u}",
    "turn off the {t}",
    "stack the {c} {t} on the {d} {t}",
    "take the {t} from the {u} and give it to the person",
    "fold the {t} from the {p} to the {q}",
    "wipe the {t} with the {u}",
    "pour the {n} into the {t}",
    "lift the {t}, then rotate it and lower it onto the {u}",
    "insert the {t} into the {u}, press the {v} and release",
    "clean up the {t}, throw the {n} away and unplug the {u}",
    "grasp the {t} under the {u}, hang it over the {v} and let go",
    "sort the {c} and {d} {t} near the {u} without touching the {v}",
]
QUESTIONS = [
    ("where is the {c} {t}", "not visible"),
    ("where is the {t} in the wrist camera", "visible"),
    ("where is the gripper", "in the {p} of the image"),
    ("which colours are the {t}", "{c}, {d}, {c}"),
    ("what color is the {t}", "{c}"),
    ("how many {t} are {c}", "{k}"),
    ("is the {c} {t} left or right of the {d} {u}", "left"),
    ("is the {t} above or below the {u}, in front of it or behind it", "right"),
    ("is the {c} {t} in a {u}", "yes"),
    ("what is the gripper holding", "the {c} {t}"),
    ("is the gripper holding something", "no"),
    ("is the gripper open or closed", "nothing"),
    ("in which {u} is the {c} {t}", "none"),
    ("from the gripper to the {c} {t}", "the {d} {u}"),
    ("detect the {t}; describe the scene in one picture", "a {c} {t} and two {u} on a table"),
    ("put the {c} {t} in the {d} {u}: where are they", "there and here"),
    ("which block is closest to the bowl, and which one is farthest from the robot arm", "unknown"),
]
PLURALS = words("""
    blocks bowls cubes cups mugs plates bottles cans objects things colours colors spoons towels fruits
""")
ENGLISH = words("""
    a about above after again all also always an and another any are around as at away back be because been before
    behind being below best better between big both but by can change clean close cold come could day different do
    does done down each easy either empty end enough even every exactly fast few fill finally find finish first
    five for four from full gently get give go good grab great had half hand hard has have he help her here high
    him his hold home hot how I if image important in into is it its just keep know large last later least leave
    less let like little long look low made make many may me mean more most move much must my near need never new
    next no none not nothing now of off often old on once one only open or other our out over own part people
    place please point press put quickly quite ready really right robot round same second see seen set several she
    should show side since six slowly small so some something soon start step still stop straight such sure take
    task ten than thank that the their them then there these they thing think third this those three through time
    to together too toward try turn two under until up unknown upper upright upside us use used using very wait
    want was water way we well were what when where which while who why will with without word work world would
    write yes yet you your zero object objects camera view scene table front behind arm gripper grasp release
    state action forward backward inside outside onto vertical horizontal angle position left kitchen bedroom room
    floor wall window chair food drink dish dishes laundry bed desk seven eight nine eleven twelve
""")
SUFFIXES = words("""
    ing ed er est ly s es tion able ment ness
""")


def fill(template: str, rng: random.Random) -> str:
    """A template with every slot drawn."""
    nouns = PLURALS if rng.random() < 0.2 else THINGS
    drawn = {"c": COLORS, "d": COLORS, "t": nouns, "u": THINGS, "v": THINGS, "n": NAMED, "p": PLACES, "q": PLACES}
    return template.format(k=rng.randrange(10), **{slot: rng.choice(words) for slot, words in drawn.items()})


def corpus(rng: random.Random) -> list[str]:
    """What the tokenizer should write in few tokens, each as often as it matters."""
    lines = []
    for _ in range(6_000):
        colors = rng.choice(COLORS[:6]), rng.choice(COLORS[:6])
        lines.append(f"put the {colors[0]} block in the {colors[1]} bowl")
        task = fill(rng.choice(TASKS), rng)
        lines.append(rng.choice([task, task.capitalize() + "."]))
        question, answer = (fill(line, rng) for line in rng.choice(QUESTIONS))
        lines += [question + rng.choice(["\n", "?\n"]), answer]
        lines.append(f"Task: {task}, State:;\nAction: ")
    for number in range(256):
        lines += [f" {number}"] * 1_000
    for word in [*ENGLISH, *THINGS, *PLURALS, *COLORS, *" ".join(NAMED + PLACES + TASKS).split()]:
        if word.isalpha():
            lines += [f" {word}"] * 200 + [word, word.capitalize()] * 10
    for word in ENGLISH:
        lines += [word + suffix for suffix in SUFFIXES]
    return lines


def train() -> Tokenizer:
    """The embedded tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(0)), trainer=trainer)
    locations = [AddedToken(f"<loc{n:04d}>", normalized=False, special=False) for n in range(LOCATIONS)]
    tokenizer.add_tokens(locations)
    return tokenizer


def main(directory: Path = EMBEDDED) -> None:
    """Write `tokenizer.json` into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(train().to_str() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
