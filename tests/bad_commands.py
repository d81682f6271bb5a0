"""Bad command lines, drawn at random but always the same: good ones with something wrong in them.

Every one is to cost one line and exit status 2, write nothing, load nothing large and take no time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRAIN = [
    *("train", "demo", "--data.source", "strokes", "--n-query", "2", "--device", "cpu", "--network.filters", "4"),
    *("--train.iterations", "2", "--train.tasks-per-step", "2", "--test.n-episodes", "4", "--test.n-query", "2"),
    *("--validation.n-query", "2", "--validation.n-episodes", "2", "--learner.inner-steps", "1"),
]
GOOD = [TRAIN, ["evaluate", "tiny-5w1s", "--n-episodes", "4"], ["reproduce", "tiny-5w1s", "--device", "cpu"]]
NO_NUMBERS = ["", "x", "-", "--", "1e", "0x5", "½", "１e", "nan", "inf", "None", "1,5", "\x00", "\udcff", "💥", "$(ls)"]
NO_NAMES = [
    *("..", ".", "", "../x", "../../outside", "/tmp/outside", "a/b", "a\\b", "~nobody", "a b", "a\nb", "a\x00b", "-x"),
    *("x" * 101, "x" * 300, "x" * 100_000, "con:", "*", "%s", "\u202e", "/dev/zero", "/dev/full", "//server/share"),
]
WRONG = [  # an option, and what no run can have
    *(("--n-way", value) for value in ("0", "-5", "20000", "1000000000", "9" * 30, "9" * 5000)),
    *(("--k-shot", value) for value in ("0", "-1", "20", "9" * 30)),
    *(("--n-query", value) for value in ("0", "-1", "1000")),
    *(("--learner.inner-lr", value) for value in ("0", "-1", "nan", "inf", "-inf")),
    *(("--learner.inner-steps", value) for value in ("-1", "1.5")),
    *(("--learner.adapt", value) for value in ("tail", "", "ALL")),
    *(("--network.filters", value) for value in ("0", "-1", "1000000000", "9" * 30)),
    *(("--network.n-blocks", value) for value in ("0", "1000000000")),
    *(("--network.normalization", value) for value in ("layer", "none")),
    *(("--network.n-halving", value) for value in ("9", "-1")),
    *(("--network.in-channels", value) for value in ("3", "0")),
    *(("--network.hidden", value) for value in ("0", "-3", "1000000000")),
    *(("--train.iterations", value) for value in ("0", "-1")),
    *(("--train.outer-lr", value) for value in ("0", "-1", "nan", "inf", "1e38")),
    *(("--train.clip-norm", value) for value in ("0", "-1", "nan")),
    *(("--train.seed", value) for value in ("-1", str(2**63), "9" * 30)),
    *(("--train.schedule", value) for value in ("linear", "")),
    *(("--train.log-every", value) for value in ("0", "-1")),
    *(("--test.n-episodes", value) for value in ("0", "1", "-4")),
    *(("--test.seed", value) for value in ("-1", str(2**63))),
    *(("--test.n-way", value) for value in ("20", "0")),
    *(("--test.name", value) for value in ("..", "a/b", "x" * 300)),
    *(("--test.split", value) for value in ("train", "")),
    *(("--validation.k-shot", value) for value in ("0", "50")),
    *(("--device", value) for value in ("tpu", "cuda:99", "", "cpu:x", "meta", "xla", "\n")),
    *(("--data.source", value) for value in ("mnist", "sinusoids", "")),
    *(("--data.seed", value) for value in ("9" * 30, "x")),
]
WRONG_EVALUATIONS = [
    *(("--n-episodes", value) for value in ("0", "1", "-1", "x", "9" * 5000)),
    *(("--split", value) for value in ("train", "")),
    *(("--device", value) for value in ("tpu", "cuda:99")),
    *(("--test.name", value) for value in ("..", "../x", "x" * 300)),
    *(("--test.k-shot", value) for value in ("0", "50", "x")),
    *(("--test.learner", value) for value in ("steps", "")),
]
CLASSIFY = [
    *([], ["nowhere"], ["."], ["x" * 300], ["a", "b", "c"], ["file"], ["/dev/null"], ["a\x00b"], [".", "."]),
    *(["--support", path, "."] for path in ("nowhere", "file", ".", "/dev/null")),
    *([".", option, value] for option, value in (("--head", "tail"), ("--backbone", "vgg"), ("--backbone", ""))),
]
DATA = [["data", command, "--data"] for command in ("info", "verify")]


@dataclass(frozen=True)
class BadCommand:
    """Arguments, and what is wrong with them."""

    kind: str
    arguments: list[str]


def bad_commands(folder: Path, seed: int = 0) -> Iterator[BadCommand]:
    """All kinds of them, each at least once, for a working folder that `bad_files` has filled."""
    draw = random.Random(seed)
    for _ in range(12):  # an option misspelt, cut off or doubled
        arguments = draw.choice(GOOD).copy()
        at = draw.choice([i for i, argument in enumerate(arguments) if argument.startswith("--")])
        spelt, letter = arguments[at], draw.randrange(3, len(arguments[at]))
        yield BadCommand("option", [*arguments[:at], f"{spelt[:letter]}q{spelt[letter:]}", *arguments[at + 1 :]])
    for _ in range(8):
        arguments = draw.choice(GOOD).copy()
        at = draw.choice([i for i, argument in enumerate(arguments) if argument.startswith("--")])
        yield BadCommand("value missing", arguments[: at + 1])
    for value in NO_NUMBERS:
        at = draw.choice([i for i, argument in enumerate(TRAIN) if argument.isdigit() and TRAIN[i - 1] != "demo"])
        yield BadCommand("no number", [*TRAIN[:at], value, *TRAIN[at + 1 :]])
    for name in NO_NAMES:
        command = draw.choice([0, 1])
        yield BadCommand("no name", [GOOD[command][0], name, *GOOD[command][2:]])
    yield from (BadCommand("wrong value", _given(TRAIN, option, value)) for option, value in WRONG)
    yield from (BadCommand("wrong value", _given(GOOD[1], option, value)) for option, value in WRONG_EVALUATIONS)
    yield from (BadCommand("classify", ["classify", *words]) for words in CLASSIFY)
    yield BadCommand("twice", [*TRAIN, "--device", "cpu"])
    yield from (BadCommand("wrong file", arguments) for arguments in _with_bad_files(folder, draw))
    for words in (["nonsense"], ["train"], ["data"], ["data", "nonsense"], [], [""], ["-"], ["💥"], ["runs", "x"]):
        yield BadCommand("no command", words)
    yield BadCommand("too long", [*TRAIN, "x" * 1_000_000])
    yield BadCommand("too long", ["evaluate", "x" * 4000])
    yield BadCommand("too many", ["train", *("x" for _ in range(500))])
    for learner in ("mann", "relation", "pretrained-cosine", "nonsense", "MAML"):  # not with this network, or at all
        yield BadCommand("learner", [*TRAIN[:-2], f"learner:{learner}", "network:pixels"])


def _given(arguments: list[str], option: str, value: str) -> list[str]:
    """The arguments with another value of an option."""
    at = arguments.index(option) if option in arguments else len(arguments)
    return [*arguments[:at], option, value, *arguments[at + 2 :]]


def _with_bad_files(folder: Path, draw: random.Random) -> Iterator[list[str]]:
    for path in sorted(folder.iterdir()):
        yield ["evaluate", f"./{path.name}"]
        if path.name not in ("weights", "header", "none"):  # which it does not read
            yield ["reproduce", f"./{path.name}/config.json", "--runs", "again"]
        yield [*draw.choice(DATA), path.name]
    for path in ("nowhere", "~nobody/x", "x" * 300, "/proc/self/mem", "a\x00b", "tiny/config.json"):
        yield [*draw.choice(DATA), path]
        yield ["reproduce", f"{path}/config.json"]
    yield [*TRAIN, "--runs", "file"]


def bad_files(folder: Path, good: Path) -> None:
    """Fill a folder with runs that are none: damaged, unreadable, of other kinds; `good` is one that is whole."""
    files = {path.name: path.read_bytes() for path in good.iterdir() if path.is_file()}
    config, record = files["config.json"], files["evaluations.json"]
    damages: dict[str, tuple[str, bytes]] = {
        "empty": ("config.json", b""),
        "binary": ("config.json", bytes(range(256))),
        "deep": ("config.json", b"[" * 100_000),
        "twice": ("config.json", config.replace(b'"k_shot": 1', b'"k_shot": 1, "k_shot": 2', 1)),
        "unknown": ("config.json", config.replace(b'"n_way"', b'"n_wya"', 1)),
        "typed": ("config.json", config.replace(b'"n_way": 5', b'"n_way": "5"', 1)),
        "method": ("config.json", config.replace(b'"maml"', b'"mamal"', 1)),
        "cut": ("config.json", config[: len(config) // 2]),
        "large": ("config.json", b'{"n_way": "' + b"x" * 3_000_000 + b'"}'),
        "echo": ("config.json", b'{"n_way": "' + b"x" * 900_000 + b'"}'),
        "filters": ("config.json", config.replace(b'"filters": 4', b'"filters": 1000000000', 1)),
        "record": ("evaluations.json", record[: len(record) // 2]),
        "accuracy": ("evaluations.json", record.replace(b'"accuracy"', b'"acuracy"', 1)),
        "named": ("evaluations.json", record.replace(b"tiny-5w1s", b"../tiny", 1)),
        "weights": ("model.safetensors", files["model.safetensors"][:-9]),
        "header": ("model.safetensors", b"\xff" * 8 + b"{}"),
        "none": ("model.safetensors", b""),
    }
    for name, (file, content) in damages.items():
        (folder / name).mkdir()
        for other, whole in files.items():
            (folder / name / other).write_bytes(content if other == file else whole)
    (folder / "blank").mkdir()
    (folder / "file").write_text("no folder")
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nowhere")


def kinds(commands: list[BadCommand]) -> dict[str, int]:
    """How many there are of each kind."""
    count: Callable[[str], int] = [command.kind for command in commands].count
    return {kind: count(kind) for kind in dict.fromkeys(command.kind for command in commands)}
