"""`dlrm conform --template`: a backend to start a port from."""

from importlib.resources import files
from pathlib import Path

from spec.errors import InputError
from spec.files import write_text


def write_template(path: Path) -> str:
    """Write it; how to run it. Raises InputError for a name that cannot be imported and for a file that exists."""
    module = path.name.removesuffix(".py")
    if not module.isidentifier() or path.suffix != ".py":
        raise InputError(str(path), "the name of a Python module, such as my_port.py", path.name, "choose another name")
    if path.exists():
        raise InputError(str(path), "a new file", "one that exists", "choose another name, or remove it")
    text = files("conformance").joinpath("template_backend.py").read_text(encoding="utf-8")
    write_text(path, text.replace("my_port", module))
    here = "" if path.resolve().parent == Path.cwd() else f"cd {path.parent}; "
    return f"{path}: written; run it: {here}dlrm conform tiny --backend {module}:BACKEND --steps 0"
