"""Look up, inside ComfyUI, what docs/host_internals.md lists. Executed there as text, so it only imports the standard library."""

import ast
import functools
import importlib
import inspect
import textwrap


def missing(internal):
    """A description of what is wrong with (path, key, positional, named); None if nothing is missing."""
    path, key, positional, named = internal
    try:
        if key is not None:
            return None if key in strings(path) else f'{path}: "{key}" is gone'
        found = look_up(path)
        return None if positional is None else _lost_arguments(path, found, positional, named)
    except (ImportError, AttributeError) as error:
        return f"{path} is gone ({error})"


def look_up(path):
    """The object, or None if it is an attribute that a class's methods set."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
            break
        except ModuleNotFoundError as error:
            if count == 1 or not error.name or not path.startswith(error.name):
                raise
    for part in parts[count:]:
        found = _attribute(found, part.removesuffix("()"))
        if part.endswith("()"):
            found = found()
    return found


def _attribute(owner, name):
    if hasattr(owner, name) or not inspect.isclass(owner):
        return getattr(owner, name)
    for node in assignments(owner):
        if node.attr == name:
            is_the_instance = node.value.id == owner.__name__  # a class that keeps its only instance
            return owner if is_the_instance else None
    raise AttributeError(f"no {name} in {owner.__name__}")


@functools.cache
def assignments(owner):
    """Assignments to `self.x` or `Class.x` in methods of a class and its bases."""
    bases = [base for base in owner.__mro__[:-1] if base.__module__.split(".")[0] != "torch"]
    sources = [ast.parse(textwrap.dedent(inspect.getsource(base))) for base in bases]
    return [node for source in sources for node in ast.walk(source) if _is_set_on_a_name(node)]


def _is_set_on_a_name(node):
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)


def always_set(function):
    """The attributes that a method sets on every path through it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return {
        node.attr
        for statement in definition.body
        if not isinstance(statement, ast.If)
        for node in ast.walk(statement)
        if _is_set_on_a_name(node)
    }


@functools.cache
def strings(module):
    """All string constants in the source of a module."""
    source = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _lost_arguments(path, function, positional, named):
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name == "self" and "self" not in positional:
        parameters = parameters[1:]
    kinds = {parameter.kind for parameter in parameters}
    in_order = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(argument.startswith("*") for argument in positional):
        return None if inspect.Parameter.VAR_POSITIONAL in kinds else f"{path} takes no *arguments any more"
    if in_order[: len(positional)] != list(positional):
        return f"{path} takes ({', '.join(in_order)}), not ({', '.join(positional)})"
    lost = [name for name in named if name not in {p.name for p in parameters}]
    if lost and inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"{path} has lost {', '.join(lost)}"
    return None
