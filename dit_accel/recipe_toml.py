"""TOML text in and out: reading with limits and line numbers, writing as a picture.

`tomllib` gives no line numbers for keys, so a second small scan finds them. It runs on text that
`tomllib` has already accepted, and therefore only has to tell keys, strings and brackets apart.
"""

import datetime
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import RecipeError

# a 10,000-step timeline is 10 kB a line; tomllib is quadratic in the length of a dotted key
MAX_BYTES = 4_000_000
MAX_LINE = 20_000
MAX_DOTS = 16
_QUOTED = re.compile(r"""\"(?:\\.|[^"\\])*+\"?|'[^']*'?""")
_DEEP = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_DOTS}}}")
_LONG_NUMBER = re.compile(r"[\d_]{400}")  # over 4,300 digits Python raises without a line

Lines = dict[tuple[str, ...], int]

_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+|\#[^\n]*)|(?P<newline>\n)"
    r'|(?P<text>"""(?:\\[\s\S]|[^\\])*?"""(?:"{1,2}(?!"))?|\'\'\'[\s\S]*?\'\'\'(?:\'{1,2}(?!\'))?'
    r'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')'
    r"|(?P<mark>[\[\]{}=,.])|(?P<bare>[^\s#\"'\[\]{}=,.]+)"
)


def read_text(path: Path) -> str:
    """The text of a recipe file, or a RecipeError that says why it cannot be one."""
    if not path.is_file():
        raise RecipeError(
            f"{path}:1: there is no such file, or it is no regular file. Give the path of a .toml file."
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}:1: cannot be read: {error}. Check the file's permissions.") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # a cut at the limit may fall inside a character: the size check then says what is wrong
        if len(raw) > MAX_BYTES:
            return raw.decode("utf-8", errors="replace")
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: is not UTF-8 text ({error.reason}). Save the recipe as UTF-8."
        ) from error


def parse_toml(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """The tables of a recipe and the line of every key; syntax errors name file and line."""
    _check_size(text, source)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        reason = (
            "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid TOML: {error}"
        )
        raise RecipeError(
            f"{source}:{line}: {reason}. Correct the line; recipes/README.md shows the format."
        ) from error
    lines = dict(_key_lines(text))
    # an unquoted `router.safetensors` in [files] is two keys to TOML and one name to us
    lines |= {("files", ".".join(path[1:])): line for path, line in lines.items() if path[0] == "files"}
    return data, lines


def _check_size(text: str, source: str) -> None:
    if len(text) > MAX_BYTES:
        raise RecipeError(
            f"{source}:1: is over {MAX_BYTES:,} bytes. A recipe is a small text; is this the right file?"
        )
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise RecipeError(
                f"{source}:{number}: the line is {len(line):,} characters long, over {MAX_LINE:,}. "
                f"Break long arrays over several lines."
            )
        if (line.count(".") > MAX_DOTS or _LONG_NUMBER.search(line)) and (bare := _QUOTED.sub("q", line)):
            if _DEEP.search(bare):
                raise RecipeError(
                    f"{source}:{number}: is nested too deeply. A recipe has three levels of tables."
                )
            if _LONG_NUMBER.search(bare):
                raise RecipeError(f"{source}:{number}: holds a number of over 400 digits. Use a smaller one.")


def _key_lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path of a key or table header, line) for valid TOML text."""
    table: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    parts: list[str] = []  # of the key being read
    open_: list[tuple[str, tuple[str, ...]]] = []  # brackets around the value being read, and whose they are
    state = "key"  # key, header or value
    line = 1
    for token in _TOKEN.finditer(text):
        kind, word = token.lastgroup, token.group()
        if kind == "newline" and not open_ and state != "header":
            state, parts = "key", []
        elif state == "value":
            if word in ("[", "{"):
                open_.append((word, path))
                state = "key" if word == "{" else "value"
            elif word in ("]", "}") and open_:
                path = open_.pop()[1]
            elif word == "," and open_ and open_[-1][0] == "{":
                state = "key"
        elif kind in ("text", "bare"):
            parts.append(_plain(word))
        elif word == "[" and state == "key" and not parts:
            state = "header"
        elif word == "]" and state == "header":
            if parts:
                table, parts = tuple(parts), []
                yield table, line
            state = "value"
        elif word == "=":
            path = (*(open_[-1][1] if open_ else table), *parts)
            parts, state = [], "value"
            yield path, line
        elif word == "}" and open_:
            path = open_.pop()[1]
            state = "value"
        line += word.count("\n")


def _plain(word: str) -> str:
    """A key part as tomllib understands it."""
    if word[0] == '"' and "\\" in word:
        return tomllib.loads(f"key = {word}")["key"]
    return word[1:-1] if word[0] in "\"'" else word


def write_value(value: Any) -> str:
    """One TOML value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{write_key(key)} = {write_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(write_value(item) for item in value)}]"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return repr(value)


def write_key(key: str) -> str:
    """A bare key where TOML allows it, else a quoted one."""
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else quote(key)


def quote(text: str) -> str:
    """A TOML basic string."""
    body = text.replace("\\", "\\\\").replace('"', '\\"')
    body = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04x}", body)
    return f'"{body}"'


def write_table(header: str, rows: Mapping[str, Any], quoted: bool = False) -> str:
    """One table with its equals signs in one column."""
    keys = [quote(key) if quoted else write_key(key) for key in rows]
    width = max(map(len, keys), default=0)
    lines = [f"{key:<{width}} = {write_value(value)}" for key, value in zip(keys, rows.values(), strict=True)]
    return "\n".join([f"[{header}]", *lines]) + "\n"


def write_timeline(header: str, rows: Mapping[str, str]) -> str:
    """A timeline table beneath a ruler that numbers every tenth step."""
    width = max((len(quote(key)) for key in rows), default=0)
    steps = max(map(len, rows.values()), default=0)
    ruler = "".join(f"{step:<10}" for step in range(0, steps, 10)).rstrip()
    head, _, body = write_table(header, rows, quoted=True).partition("\n")
    return f"{head}\n#{' ' * (width + 3)}{ruler}\n{body}"
