"""How the tests read the document: its cells, its prose, and what is wrong with them.

Every checker takes a `Document` and returns complaints, a list of lines; none means all
is well.
"""

import ast
import builtins
import doctest
import importlib
import inspect
import re
import symtable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jupytext

LAST_ROOM = 17
# Rooms with machinery: circumstances, drawings, counts, docstrings, checkpoints, tasks
FOLDED = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
GIVEN = {*vars(builtins), "__file__", "__name__", "__doc__"}  # without being defined


@dataclass(frozen=True)
class Cell:
    kind: str  # "code" or "markdown"
    source: str
    room: int  # -1 before room 0; appendices A, B, ... count on from LAST_ROOM + 1
    line: int  # of the cell's marker in the script
    tags: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"line {self.line}"

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source if self.kind == "code" else "")


@dataclass(frozen=True)
class Document:
    text: str
    cells: tuple[Cell, ...]
    root: Path  # the folder that its links start from

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def prose(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "markdown"]


def room_of(title: str, before: int) -> int:
    """The room that a heading of the second level begins; if none, the one before."""
    number = re.match(r"(\d+)\. ", title)
    letter = re.match(r"Appendix ([A-Z])\. ", title)
    if number:
        return int(number[1])
    if letter:
        return LAST_ROOM + 1 + ord(letter[1]) - ord("A")
    return before


def read(text: str, root: Path) -> Document:
    """Cut a py:percent script into cells, each with its room."""
    room = -1
    cells = []
    markers = [
        n for n, line in enumerate(text.splitlines(), 1) if line.startswith("# %%")
    ]
    found = jupytext.reads(text, "py:percent").cells
    for line, cell in zip(markers, found, strict=True):
        if cell.cell_type == "markdown":
            for _, title in headings_of(cell.source, 2):
                room = room_of(title, room)
        tags = tuple(cell.metadata.get("tags", ()))
        cells.append(Cell(cell.cell_type, cell.source, room, line, tags))
    return Document(text, tuple(cells), root)


# Prose: headings, code spans, formulas, links


def without_fences(markdown: str) -> str:
    """The text without fenced code, whose lines become empty."""
    return re.sub(
        r"^(```|~~~).*?^\1[^\n]*$", "", markdown, flags=re.MULTILINE | re.DOTALL
    )


def plain(markdown: str) -> str:
    """The text without any code: no fences, no spans, no comments."""
    shown = re.sub(r"<!--.*?-->", "", without_fences(markdown), flags=re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", shown, flags=re.DOTALL)


def without_formulas(markdown: str) -> str:
    text = re.sub(r"\$\$.+?\$\$", "FORMULA", plain(markdown), flags=re.DOTALL)
    return re.sub(r"(?<!\\)\$[^$]+?(?<!\\)\$", "FORMULA", text)


def spans(markdown: str) -> list[str]:
    """What stands between backticks, on one line."""
    found = re.finditer(
        r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", without_fences(markdown), re.DOTALL
    )
    return [" ".join(match[2].split()) for match in found]


def headings_of(markdown: str, level: int | None = None) -> list[tuple[int, str]]:
    found = re.findall(r"^(#{1,6}) +(.+?) *#*$", without_fences(markdown), re.MULTILINE)
    return [
        (len(marks), title) for marks, title in found if level in (None, len(marks))
    ]


def slugs(document: Document) -> set[str]:
    """The anchors that GitHub gives the headings; a repeated one counts on: -1, -2."""
    found = set()
    seen = {}
    for cell in document.prose:
        for _, title in headings_of(cell.source):
            text = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title).lower()
            slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
            seen[slug] = seen.get(slug, 0) + 1
    return found


def links(markdown: str) -> list[tuple[bool, str, str, str]]:
    """(is an image, text or alt, target, title) of every inline link, image and bare
    address.
    """
    text = without_formulas(markdown)
    inline = (
        r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^)>"]*?)>?(?:\s+"([^"]*)")?\s*\)'
    )
    matches = list(re.finditer(inline, text))
    matches += [
        inner for m in matches for inner in re.finditer(inline, m[2])
    ]  # a linked image
    found = [(bool(m[1]), m[2], m[3].strip(), m[4] or "") for m in matches]
    found += [(False, "", m[1], "") for m in re.finditer(r"<(https?:[^>\s]*)>", text)]
    return found


# Code: definitions, loaded names, docstrings


def definitions(document: Document) -> list[tuple[Cell, ast.AST]]:
    """Functions and classes at the top of the document's cells."""
    found = [(cell, node) for cell in document.code for node in cell.tree.body]
    return [(cell, node) for cell, node in found if isinstance(node, DEFINITIONS)]


def decorators(node: ast.AST) -> set[str]:
    """Names of a definition's decorators: figure for both @figure and @figure(...)."""
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(call) for call in calls}


def docstrings(tree: ast.Module) -> list[tuple[str, str]]:
    """(name, docstring) of every definition in the tree that has one."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    found = [(node.name, ast.get_docstring(node)) for node in nodes]
    return [(name, text) for name, text in found if text]


def examples(docstring: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(docstring)


def tables(table: symtable.SymbolTable) -> list[symtable.SymbolTable]:
    """The table of a piece of code and those of all functions and classes in it."""
    return [table] + [
        inner for child in table.get_children() for inner in tables(child)
    ]


def bound(source: str) -> set[str]:
    """Names that the code defines at its top (or declares global further in)."""
    top, *inner = tables(symtable.symtable(source, "cell", "exec"))
    names = {
        s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()
    }
    names |= {s.get_name() for s in top.get_symbols() if s.is_namespace()}
    return names | {
        symbol.get_name()
        for table in inner
        for symbol in table.get_symbols()
        if symbol.is_declared_global() and symbol.is_assigned()
    }


def loaded(source: str) -> set[str]:
    """Names that the code takes from the module: at its top, or global further in."""
    top, *inner = tables(symtable.symtable(source, "cell", "exec"))
    names = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    return names | {
        symbol.get_name()
        for table in inner
        for symbol in table.get_symbols()
        if symbol.is_global() and symbol.is_referenced()
    }


def figures(document: Document) -> list[tuple[str, str, dict[str, str]]]:
    """(place, function, literal arguments) of every function under @figure(...)."""
    found = []
    for cell, node in definitions(document):
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "figure":
                literal = [
                    k for k in call.keywords if isinstance(k.value, ast.Constant)
                ]
                found.append(
                    (cell.where, node.name, {k.arg: k.value.value for k in literal})
                )
    return found


# Checkers of the order


def check_rooms(document: Document) -> list[str]:
    """The title, then rooms 0 to 17 in order, then appendices A, B, ..."""
    titles = [h for cell in document.prose for h in headings_of(cell.source)]
    complaints = []
    if titles[:1] != [(1, "The Annotated BiGS")]:
        complaints.append(f"the first heading is {titles[:1]}, not the title")
    if sum(level == 1 for level, _ in titles) != 1:
        complaints.append("there is more than one title")
    seconds = [title for level, title in titles if level == 2]
    numbers = [re.match(r"(\d+\.|Appendix [A-Z]\.) \S", title) for title in seconds]
    if None in numbers:
        complaints.append("a ## heading is neither `N. Title` nor `Appendix X. Title`")
    found = [match[1] for match in numbers if match]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: max(0, len(found) - LAST_ROOM - 1)]
    expected = [f"{n}." for n in range(LAST_ROOM + 1)] + [
        f"Appendix {x}." for x in letters
    ]
    if found != expected:
        complaints.append(f"rooms are {found}, not {expected}")
    return complaints


def check_appendix_tags(document: Document) -> list[str]:
    """Code is tagged `appendix` where it stands behind the last room, and else only in
    FOLDED rooms.
    """
    return [
        f"{cell.where}: tags are {list(cell.tags)} in room {cell.room}"
        for cell in document.code
        if ("appendix" in cell.tags) != (cell.room > LAST_ROOM)
        and cell.room not in FOLDED
    ]


def check_names(document: Document) -> list[str]:
    """A room uses only names of its own or earlier rooms, in code and in doctests, and
    no name stands for two things.
    """
    home = {}
    complaints = []
    for cell in document.code:
        names = bound(cell.source) - {"_"}
        complaints += [
            f"{cell.where}: {name} has a meaning in room {home[name]}"
            for name in sorted(names & home.keys())
        ]
        home |= dict.fromkeys(names - home.keys(), cell.room)
    for cell in document.code:
        uses = [("", loaded(cell.source))]
        for owner, text in docstrings(cell.tree):
            source = "\n".join(example.source for example in examples(text))
            uses.append((f"doctest of {owner}: ", loaded(source) - bound(source)))
        for place, names in uses:
            for name in sorted(names):
                if name not in home and name not in GIVEN:
                    complaints.append(f"{cell.where}: {place}{name} is defined nowhere")
                elif home.get(name, -1) > cell.room:
                    complaints.append(
                        f"{cell.where}: {place}{name} comes from room {home[name]}"
                    )
    return complaints


def check_rhythm(document: Document) -> list[str]:
    """Prose stands between any two code cells."""
    pairs = zip(document.cells, document.cells[1:], strict=False)
    return [
        f"{b.where}: code follows code" for a, b in pairs if a.kind == b.kind == "code"
    ]


# Checkers: size and manners of code


def check_line_length(document: Document, most: int = 88) -> list[str]:
    """Prose may be wider, for the sake of tables; code scrolls on nobody's screen."""
    return [
        f"{cell.where}: {len(line)} columns: {line.strip()}"
        for cell in document.code
        for line in cell.source.splitlines()
        if len(line) > most
    ]


# What takes too long for a doctest; tests/ runs each of them.
TESTED_AT_LENGTH = {
    "attend_time_first",
    "embedded_english",
    "mix_channels",
    "mix_tokens",
    "order_task",
    "pretrain",
    "tiny_dataset",
    "tiny_finetuned",
    "tiny_run",
}


def needs_doctest(node: ast.AST) -> bool:
    """Whether a definition has to show itself at work: no record, no figure, and
    nothing that takes too long.
    """
    if node.name.startswith("_") or node.name in TESTED_AT_LENGTH:
        return False
    if isinstance(node, ast.ClassDef):
        return "NamedTuple" not in map(ast.unparse, node.bases)
    return not decorators(node) & {"example", "figure"}


def check_doctests(document: Document, least: int = 60) -> list[str]:
    """Public functions and classes of the main line prove what their docstrings say."""
    complaints = []
    for cell, node in definitions(document):
        if cell.room > LAST_ROOM or not needs_doctest(node):
            continue
        texts = [text for _, text in docstrings(ast.Module([node], []))]
        if not any(examples(text) for text in texts):
            complaints.append(f"{cell.where}: {node.name} has no doctest")
    texts = [text for cell in document.code for _, text in docstrings(cell.tree)]
    count = sum(len(examples(text)) for text in texts)
    return complaints + [f"only {count} doctest examples"] * (count < least)


# Checkers of the prose


def check_words(document: Document) -> list[str]:
    """Our own words, quotations aside, do without these three."""
    texts = [(cell.where, plain(cell.source)) for cell in document.prose]
    for where, _, literal in figures(document):
        texts += [(where, literal.get("caption", "")), (where, literal.get("alt", ""))]
    return [
        f"{where}: {word} in: {line.strip()}"
        for where, text in texts
        for line in text.splitlines()
        if not line.startswith(">")
        for word in re.findall(r"\b(?:simply|just|obviously)\b", line, re.IGNORECASE)
    ]


def check_markup(document: Document) -> list[str]:
    """Dollars pair up as pandoc and GitHub pair them; nothing shows raw; no doctest in
    prose.
    """
    complaints = []
    for cell in document.prose:
        if ">>>" in cell.source:
            complaints.append(f"{cell.where}: a doctest in prose is run by nobody")
        text = plain(cell.source).replace(r"\$", "")
        if text.count("$$") % 2:
            complaints.append(f"{cell.where}: unbalanced $$")
        rest = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n", rest):
            parts = paragraph.split("$")
            if len(parts) % 2 == 0:
                complaints.append(f"{cell.where}: unbalanced $ in: {paragraph.strip()}")
            elif any(not p or p != p.strip() for p in parts[1::2]):
                complaints.append(
                    f"{cell.where}: space beside $ in: {paragraph.strip()}"
                )
        complaints += [
            f"{cell.where}: raw {x}" for x in re.findall(r"\[-?@[^\]]*\]?", text)
        ]
    return complaints


def check_links(document: Document) -> list[str]:
    """Relative links lead to files, anchors to headings; addresses are well formed."""
    anchors = slugs(document)
    complaints = []
    for cell in document.prose:
        for _, _, target, _ in links(cell.source):
            if target.startswith("#"):
                good = unquote(target[1:]) in anchors
            elif re.match(r"[a-z]+:", target):
                good = is_address(target)
            else:
                path = unquote(target.split("#")[0])
                good = bool(path) and (document.root / path).exists()
            if not good:
                complaints.append(f"{cell.where}: nothing at {target!r}")
        for broken in re.findall(
            r"\]\s+\((?:https?:|#)[^)]*\)", without_formulas(cell.source)
        ):
            complaints.append(f"{cell.where}: a space breaks the link {broken}")
    return complaints


def is_address(target: str) -> bool:
    parts = urlsplit(target)
    host = re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.hostname or "")
    return (
        parts.scheme in ("http", "https")
        and bool(host)
        and not re.search(r"[\s<>\"]", target)
    )


def check_figures(document: Document, least: int = 30) -> list[str]:
    """Figures say to who cannot see them what they show, have a caption, and lie in
    figures/.
    """
    complaints = []
    names = []
    for where, function, literal in figures(document):
        if len(literal.get("alt", "")) < least:
            complaints.append(f"{where}: {function} has no alt text worth the name")
        if not literal.get("caption", "").strip():
            complaints.append(f"{where}: {function} has no caption")
        if not literal.get("name"):
            complaints.append(f"{where}: {function} has no name")
        names.append(literal.get("name"))
    complaints += [
        f"two figures are called {name}" for name in set(names) if names.count(name) > 1
    ]
    drawn = {f"{name}.png" for name in names}
    there = {path.name for path in (document.root / "figures").glob("[!.]*")}
    complaints += [f"figures/{name} is not there" for name in sorted(drawn - there)]
    complaints += [
        f"figures/{name} is drawn by nothing" for name in sorted(there - drawn)
    ]
    return complaints


def check_images(document: Document, least: int = 30) -> list[str]:
    """Images in prose have an alt text and a caption: a title, or a paragraph that
    follows in italics or begins with "Figure".
    """
    complaints = []
    for cell in document.prose:
        if "<img" in plain(cell.source):
            complaints.append(f"{cell.where}: an <img>; write ![alt](file)")
        for is_image, alt, target, title in links(cell.source):
            is_badge = target.endswith(".svg") and target.startswith("https:")
            if is_image and len(alt) < (1 if is_badge else least):
                complaints.append(
                    f"{cell.where}: {target} has no alt text worth the name"
                )
            after = cell.source.partition(f"]({target}")[2].partition("\n\n")[2]
            has_caption = title or re.match(r"\W*Figure\b|\*[^*\s]", after)
            if is_image and not is_badge and not has_caption:
                complaints.append(f"{cell.where}: {target} has no caption")
    return complaints


# Checkers: spans of code in prose


def expression(span: str) -> ast.expr | None:
    try:
        return ast.parse(span, mode="eval").body
    except SyntaxError:
        return None


def is_claim(node: ast.expr | None) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(is_claim(value) for value in node.values)
    return isinstance(node, ast.Compare)


def check_claims(document: Document, namespace: dict) -> list[str]:
    """A code span that compares is true."""
    complaints = []
    for cell in document.prose:
        for span in filter(lambda span: is_claim(expression(span)), spans(cell.source)):
            try:
                value = eval(span, dict(namespace))
                complaints += (
                    [] if bool(value) else [f"{cell.where}: `{span}` is false"]
                )
            except Exception as error:
                complaints.append(f"{cell.where}: `{span}` raises {error!r}")
    return complaints


def vocabulary(document: Document) -> tuple[set[str], set[str], set[str]]:
    """Names inside the definitions of the document and of the workshop beside it:
    (variables, attributes, strings of code).
    """
    variables = set()
    attributes = set()
    strings = set()
    workshop = (document.root / "workshop").glob("*.py")
    trees = [cell.tree for cell in document.code]
    trees += [ast.parse(file.read_text()) for file in sorted(workshop)]
    for tree in trees:
        docs = {text for _, text in docstrings(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.arg | ast.keyword):
                variables.add(node.arg or "")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                variables.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                attributes.add(node.attr)
            elif isinstance(node, ast.ClassDef):
                fields = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
                attributes |= {
                    field.id for field in fields if isinstance(field, ast.Name)
                }
                attributes |= {n.name for n in node.body if isinstance(n, FUNCTIONS)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings |= {node.value} - docs
    return variables, attributes, strings


def look_up(path: str, namespace: dict, libraries: set[str]) -> object:
    """What a dotted name stands for; raises AttributeError, ImportError or KeyError if
    nothing.
    """
    root, *rest = path.split(".")
    if root in namespace:
        value = namespace[root]
    elif hasattr(builtins, root):
        value = getattr(builtins, root)
    elif root in libraries:
        value = importlib.import_module(root)
    else:
        raise KeyError(root)
    for name in rest:
        if inspect.ismodule(value) and not hasattr(value, name):
            importlib.import_module(f"{value.__name__}.{name}")
        elif inspect.isclass(value) and name in getattr(value, "__annotations__", ()):
            return None
        value = getattr(value, name)
    return value


def misfit(call: ast.Call, function: object) -> str | None:
    """Why the call would not fit the function's parameters; f() and f(...) stand for
    any call.
    """
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    is_open = any(
        isinstance(a, ast.Starred) or (isinstance(a, ast.Constant) and a.value is ...)
        for a in arguments
    )
    if (
        not arguments
        or is_open
        or any(keyword.arg is None for keyword in call.keywords)
    ):
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
    except TypeError as error:
        return str(error)
    return None


def check_spans(
    document: Document,
    namespace: dict,
    libraries: set[str],
    allowed: frozenset[str] = frozenset(),
) -> list[str]:
    """A code span that is a name, a dotted name, a call, an option or a path names what
    exists.
    """
    variables, attributes, strings = vocabulary(document)
    tops = {path.name for path in document.root.iterdir()}

    def problem(span: str) -> str | None:
        if span in allowed or span in strings or (document.root / span).exists():
            return None
        option = re.match(r"--([a-z][a-z-]*)", span)
        if option:
            known = {
                option[1].replace("-", "_"),
                option[1].removeprefix("no-").replace("-", "_"),
            }
            return None if known & (variables | attributes) else "is no option"
        command = re.match(r"(?:\S*python3? )?annotated_bigs\.py ([a-z-]+)", span)
        if command:
            known = {command[1], command[1].replace("-", "_")}
            return None if known & (strings | set(namespace)) else "is no command"
        if re.fullmatch(r"[\w.-]+(/[\w.*-]*)+", span) and span.split("/")[0] in tops:
            return (
                "is no file" if not list(document.root.glob(span.rstrip("/"))) else None
            )
        node = expression(span)
        target = node.func if isinstance(node, ast.Call) else node
        path = (
            ast.unparse(target) if isinstance(target, ast.Name | ast.Attribute) else ""
        )
        if not re.fullmatch(r"[\w.]+", path):
            return None
        root, *rest = path.split(".")
        try:
            value = look_up(path, namespace, libraries)
            return misfit(node, value) if isinstance(node, ast.Call) else None
        except (AttributeError, ImportError, KeyError):
            # A variable stands for any object of the document: its attributes must be
            # known.
            known = variables | attributes if not rest else variables | {"self"}
            own = root in known and set(rest) <= attributes
            return None if own else "names nothing"

    complaints = []
    for cell in document.prose:
        found = [(span, problem(span)) for span in spans(cell.source)]
        complaints += [f"{cell.where}: `{span}` {why}" for span, why in found if why]
    return complaints
