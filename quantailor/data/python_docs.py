"""English text that every Python installation already carries: its help topics and the standard library's docstrings.

The built-in demo model is trained and measured on it, so nothing has to be downloaded. Sources are parsed, never
imported: importing `this` prints a poem and `antigravity` opens a browser. The amount differs a little between Python
versions (a Linux distribution may leave parts out), which is why a perplexity on it is quoted with the Python version.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantailor.errors import UntrustedInput

MIN_CHARACTERS = 200  # shorter docstrings are mostly "Return the x.", which teach and measure little
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo"}


def documents(stdlib: Path | None = None) -> list[str]:
    """Help topics, then docstrings by file and line: at least `MIN_CHARACTERS` long, each text once.

    `stdlib` is the folder with the standard library's sources; by default that of the running Python.
    Raises: UntrustedInput if it holds neither topics nor docstrings, as in a Python shipped without sources.
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    topics_file = folder / "pydoc_data" / "topics.py"
    found = [*_topics(topics_file)]
    for path in _sources(folder):
        if path != topics_file:
            found += _docstrings(path)
    stripped = (text.strip() for text in found)
    unique = dict.fromkeys(text for text in stripped if len(text) >= MIN_CHARACTERS)  # a dict keeps the order
    if not unique:
        raise UntrustedInput(f"no Python documentation in {folder}; use a Python with its .py sources, or pass --data")
    return list(unique)


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """(train, valid), about 90:10. A hash of a text's first line decides: the same everywhere.

    Not of the whole text: each Python version edits a few sentences, and an edited text could fall into valid although
    the shipped model was trained on its older form. By whole texts, 38 % of the word 8-grams in Python 3.13's valid
    were in 3.11's train; by first lines 9 %, no more than within one version.

    >>> train, valid = split(str(number) for number in range(1000))
    >>> len(train), len(valid)
    (897, 103)
    """
    train: list[str] = []
    valid: list[str] = []
    for text in documents:
        first_line = text.partition("\n")[0].strip()
        digest = hashlib.sha256(first_line.encode("utf-8", "surrogatepass")).digest()
        (valid if int.from_bytes(digest[:8], "big") % 10 == 0 else train).append(text)
    return train, valid


def _sources(folder: Path) -> list[Path]:
    """The standard library's .py files in an order that does not depend on the file system."""
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    kept = [path for path in relative if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    return [folder / path for path in sorted(kept, key=lambda path: path.parts)]


def _parsed(path: Path) -> ast.Module | None:
    """None where the file cannot be read or is not Python of this version: one odd file must not cost all others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in someone else's strings are no news to our user
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _topics(path: Path) -> Iterator[str]:
    """The values of `topics = {...}`, what `help("LISTS")` and its like print."""
    tree = _parsed(path)
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from (
                value.value
                for value in statement.value.values
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
            )


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in the order of their lines, indentation removed."""
    tree = _parsed(path)
    if tree is None:
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        yield ast.get_docstring(node) or ""
