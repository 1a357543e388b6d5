"""Functions of a source file: find them, empty them, put ours in the place of others.

Everything is done on the syntax tree of the current source, so that nothing can go stale.
A function's name is "q_sample", or "MaxPooling.forward" for a method.
"""

import ast
from functools import cache
from pathlib import Path

from course.listing import EXERCISES

ROOT = Path(__file__).parent.parent


def read_ours(file):
    """The repository's source of a file, such as "ddpm.py"."""
    return (ROOT / file).read_text(encoding="utf-8")


def find_functions(tree):
    """{name: node} of the functions of a file and the methods of its classes."""
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    functions[f"{node.name}.{part.name}"] = part
    return functions


def has_docstring(node):
    return ast.get_docstring(node, clean=False) is not None


def dump_code(node):
    """What a function does, as text: without line numbers, comments and its docstring."""
    body = node.body[1:] if has_docstring(node) else node.body
    parts = [ast.dump(node.args), *[ast.dump(statement) for statement in body]]
    return "\n".join(parts)


# ---------------------------------------------------------------- emptying

def find_last_given(lines, node, start):
    """The last line of the statement that begins with `start`. ValueError if there is none."""
    for statement in node.body:
        if lines[statement.lineno - 1].strip().startswith(start):
            return statement.end_lineno
    raise ValueError(f"{node.name} has no statement that begins with {start!r}")


def empty_function(source, exercise, name):
    """The source with one function of the exercise emptied; its signature and docstring stay."""
    functions = find_functions(ast.parse(source))
    if name not in functions:
        raise ValueError(f"exercise {exercise.number}: {exercise.file} has no function {name}")
    node = functions[name]
    lines = source.split("\n")
    # Which lines stay: the signature, the docstring, and what is given.
    last_kept = node.body[0].lineno - 1
    if has_docstring(node):
        last_kept = node.body[0].end_lineno
    if name in exercise.given:
        last_kept = find_last_given(lines, node, exercise.given[name])
    message = f"exercise {exercise.number}: {exercise.title}, {exercise.module}.{name}"
    indent = " " * node.body[0].col_offset
    lines[last_kept : node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def empty_functions(source, exercise):
    """The source with all functions of the exercise emptied."""
    for name in exercise.functions:
        source = empty_function(source, exercise, name)
    return source


def make_handout(file):
    """What a student gets of a file: ours, with the functions of all its exercises emptied."""
    source = read_ours(file)
    for exercise in EXERCISES:
        if exercise.file == file:
            source = empty_functions(source, exercise)
    return source


# ---------------------------------------------------------------- comparing and replacing

@cache
def dump_handout(file):
    """{name: code} of the functions of a file as it is handed out."""
    functions = find_functions(ast.parse(make_handout(file)))
    return {name: dump_code(node) for name, node in functions.items()}


def is_untouched(exercise, tree):
    """Whether all functions of the exercise are still empty."""
    handout = dump_handout(exercise.file)
    theirs = find_functions(tree)
    return all(dump_code(theirs[name]) == handout[name] for name in exercise.functions)


def use_ours_elsewhere(exercise, tree):
    """In a student's tree, put ours in place of the functions of the module's other exercises.

    So an exercise is graded by itself, whatever the others are. ValueError if one is missing.
    """
    theirs = find_functions(tree)
    ours = find_functions(ast.parse(read_ours(exercise.file)))
    for other in EXERCISES:
        if other.module != exercise.module:
            continue
        for name in other.functions:
            if name not in theirs:
                raise ValueError(f"{exercise.file} has no function {name} any more")
            if other is not exercise:
                theirs[name].args = ours[name].args
                theirs[name].body = ours[name].body


def find_changes(file, source):
    """The functions of a file that are no exercises and are not ours any more: their names.

    SyntaxError if it is no Python.
    """
    exercises = set()
    for exercise in EXERCISES:
        if exercise.file == file:
            exercises.update(exercise.functions)
    theirs = find_functions(ast.parse(source))
    ours = find_functions(ast.parse(read_ours(file)))
    changed = []
    for name, node in ours.items():
        if name in exercises:
            continue
        if name not in theirs or dump_code(theirs[name]) != dump_code(node):
            changed.append(name)
    return changed
