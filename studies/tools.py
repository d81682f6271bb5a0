"""Which libraries for meta-learning install, import and work today? `python studies/tools.py` measures it.

Every package gets a virtual environment of its own, with the PyTorch of the Python that runs this and nothing else.
pip may not replace that PyTorch. What pip chooses is imported, and asked for one small thing that the library is for.
The answers go to `results/studies/tools.json`; `make tables` fills the book's table from it. Needs the network.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent, shorten
from typing import Any

from common import write

from metatutor.runs import study


@dataclass(frozen=True)
class Tool:
    """A package of PyPI: what to import, and a few lines that work if the library does."""

    package: str
    module: str
    smoke: str


@dataclass(frozen=True)
class Outcome:
    """What came of one package. `version` is what pip chose, or the newest where it chose none."""

    package: str
    version: str | None
    newest: str | None
    released: str | None
    installs: bool
    imports: bool
    works: bool
    error: str | None
    python: str
    torch: str
    date: str


TOOLS = (
    Tool(
        "torch",
        "torch.func",
        """
        from torch.func import functional_call, grad, vmap
        model, x = torch.nn.Linear(2, 1), torch.ones(3, 4, 2)
        def loss(parameters, x): return functional_call(model, parameters, (x,)).square().mean()
        def adapted_loss(parameters, x):
            step = grad(loss)(parameters, x)
            return loss({name: p - 0.1 * step[name] for name, p in parameters.items()}, x)
        found = vmap(grad(adapted_loss), in_dims=(None, 0))(dict(model.named_parameters()), x)
        assert found["weight"].shape == (3, 1, 2)
        """,
    ),
    Tool(
        "learn2learn",
        "learn2learn",
        """
        model, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
        clone = learn2learn.algorithms.MAML(model, lr=0.1).clone()
        clone.adapt(clone(x).square().mean())
        clone(x).square().mean().backward()
        assert model.weight.grad.isfinite().all()
        """,
    ),
    Tool(
        "higher",
        "higher",
        """
        model, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (adapted, descent):
            descent.step(adapted(x).square().mean())
            adapted(x).square().mean().backward()
        assert model.weight.grad.isfinite().all()
        """,
    ),
    Tool(
        "torchopt",
        "torchopt",
        """
        model, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
        start = torchopt.extract_state_dict(model)
        torchopt.MetaSGD(model, lr=0.1).step(model(x).square().mean())
        adapted = model(x).square().mean()
        torchopt.recover_state_dict(model, start)
        adapted.backward()
        assert model.weight.grad.isfinite().all()
        """,
    ),
    Tool(
        "betty-ml",
        "betty.engine",
        """
        from betty.configs import Config, EngineConfig
        from betty.problems import ImplicitProblem
        class Outer(ImplicitProblem):
            def training_step(self, batch): return self.inner(batch[0]).square().mean()
        class Inner(ImplicitProblem):
            def training_step(self, batch): return (self(batch[0]) - self.outer(batch[0])).square().mean()
        def problem(kind, name, type, module):
            sgd = torch.optim.SGD(module.parameters(), lr=0.1)
            return kind(name=name, config=Config(type=type), module=module, optimizer=sgd, train_data_loader=data)
        data = [(torch.ones(4, 2),)]
        outer = problem(Outer, "outer", "darts", torch.nn.Linear(2, 1))
        inner = problem(Inner, "inner", "darts", torch.nn.Linear(2, 1))
        before = outer.module.weight.detach().clone()
        links = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
        betty.engine.Engine(config=EngineConfig(train_iters=2), problems=[outer, inner], dependencies=links).run()
        assert not torch.equal(outer.module.weight, before)
        """,
    ),
    Tool(
        "torchmeta",
        "torchmeta.modules",
        "assert torchmeta.modules.MetaLinear(2, 1)(torch.ones(4, 2)).shape == (4, 1)",
    ),
    Tool(
        "easyfsl",
        "easyfsl.methods",
        """
        learner = easyfsl.methods.PrototypicalNetworks(torch.nn.Flatten())
        learner.process_support_set(torch.eye(5), torch.arange(5))
        assert learner(torch.eye(5)).argmax(1).tolist() == [0, 1, 2, 3, 4]
        """,
    ),
    Tool(
        "timm",
        "timm",
        """
        model = timm.create_model("resnet18", pretrained=False, num_classes=0)
        assert model(torch.ones(1, 3, 64, 64)).shape == (1, 512)
        """,
    ),
    Tool(
        "open-clip-torch",
        "open_clip",
        """
        model = open_clip.create_model("RN50", pretrained=None)
        assert model.encode_text(open_clip.tokenize(["a photo of a cat"])).shape == (1, 1024)
        """,
    ),
    Tool(
        "optax",
        "optax",
        """
        import jax
        sgd = optax.sgd(0.1)
        def adapted_loss(w):
            step, _ = sgd.update(jax.grad(lambda w: w**2)(w), sgd.init(w))
            return optax.apply_updates(w, step) ** 2
        assert abs(jax.grad(adapted_loss)(1.0) - 2 * 0.8**2) < 1e-6
        """,
    ),
    Tool(
        "flax",
        "flax.linen",
        """
        import jax
        model, x = flax.linen.Dense(1), jax.numpy.ones((4, 2))
        parameters = model.init(jax.random.key(0), x)
        assert model.apply(parameters, x).shape == (4, 1)
        """,
    ),
)


def released(package: str, chosen: str | None) -> tuple[str | None, str | None]:
    """The newest version on PyPI, and the day on which `chosen` (or else the newest) came out."""
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/{package}/json", timeout=60) as answer:
            about: dict[str, Any] = json.load(answer)
    except OSError:
        return None, None
    newest: str = about["info"]["version"]
    files = about["releases"].get(chosen or newest, [])
    return newest, min((file["upload_time"][:10] for file in files), default=None)


def complaint(output: str) -> str:
    """The line of an output that says most about what went wrong, without the paths of this machine."""
    lines = [re.sub(r"(?<![\w.~-])(?:/[\w.+~-]+)+/", "", line).strip() for line in output.splitlines() if line.strip()]
    for telling in (
        r"depends on torch\b",
        r"fatal error: ",
        r"^(?!subprocess)\w*(?:Error|Exception|NotFound): ",
        r"(?i)^error: (?!subprocess)",
        r"",
    ):
        found = [line for line in lines if re.search(telling, line)]
        if found:
            return shorten(found[-1 if not telling else 0], 130, placeholder=" …")
    return "no message"


def environment(folder: Path, *shared: Path) -> Path:
    """A new virtual environment with the newest pip that also sees the packages of the folders `shared`; its Python."""
    venv.create(folder, with_pip=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--upgrade", "pip")
    return python


def run(python: Path, *arguments: str) -> tuple[bool, str]:
    """Whether a call of Python succeeded, and what it said."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=1800, cwd=python.parent)
    return done.returncode == 0, done.stdout + done.stderr


def question(tool: Tool) -> str:
    """The program that a package is asked to run."""
    return f"import torch\nimport {tool.module}\n{dedent(tool.smoke)}"


def outcome(tool: Tool, python: Path, constraints: Path) -> Outcome:
    """Install, import and try one package in the environment of `python`."""
    installs, said = run(python, "-m", "pip", "install", "--constraint", str(constraints), tool.package)
    imports, works, chosen = False, False, None
    if installs:
        _, chosen = run(python, "-c", f"from importlib.metadata import version; print(version({tool.package!r}))")
        imports, said = run(python, "-c", f"import {tool.module}")
    if imports:
        works, said = run(python, "-c", question(tool))
    newest, day = released(tool.package, chosen and chosen.strip())
    return Outcome(
        package=tool.package,
        version=chosen.strip() if chosen else newest,
        newest=newest,
        released=day,
        installs=installs,
        imports=imports,
        works=works,
        error=None if works else complaint(said),
        python=platform.python_version(),
        torch=version("torch"),
        date=date.today().isoformat(),
    )


def measured(tools: tuple[Tool, ...]) -> Iterator[Outcome]:
    """Try the packages, one after another."""
    with tempfile.TemporaryDirectory() as temporary:
        base = environment(Path(temporary) / "base")
        constraints = Path(temporary) / "constraints.txt"
        constraints.write_text(f"torch=={version('torch')}\n")
        there, said = run(base, "-m", "pip", "install", f"torch=={version('torch')}")
        if not there:
            raise RuntimeError(f"pip cannot install torch {version('torch')}: {complaint(said)}")
        [packages] = base.parents[1].glob("lib/python*/site-packages")
        for number, tool in enumerate(tools):
            yield outcome(tool, environment(Path(temporary) / str(number), packages), constraints)


def main() -> None:
    """Measure the packages named, or all, and record them."""
    parser = argparse.ArgumentParser(description="Which libraries for meta-learning install, import and work today?")
    parser.add_argument("packages", nargs="*", help="only these; what is recorded of others stays")
    only = parser.parse_args().packages
    known = {tool.package for tool in TOOLS}
    if unknown := sorted(set(only) - known):
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    recorded = {row["package"]: row for row in study("tools")}
    for found in measured(tuple(tool for tool in TOOLS if not only or tool.package in only)):
        print(found)
        recorded[found.package] = asdict(found)
    write("tools", [recorded[tool.package] for tool in TOOLS if tool.package in recorded])


if __name__ == "__main__":
    main()
