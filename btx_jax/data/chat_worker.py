"""Renders chat templates in a separate process: `python -I chat_worker.py`.

A template comes with a checkpoint and is untrusted code. jinja's sandbox denies it attributes and
files. The length of its output is limited here, its memory by the kernel, and its time by the
requesting process. Reads requests as JSON lines and answers each with one line.

The environment is that of transformers (5.23, utils/chat_template_utils.py): trim_blocks,
lstrip_blocks, loop controls, the `generation` tag, `tojson`, `raise_exception`, `strftime_now`,
`dict`, `namespace`.
"""

import datetime
import functools
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space
RENDERED = 1 << 26  # maximum characters of one chat


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %}` around the assistant's text; records the spans of that text."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(parts=[], spans=[])

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text = caller()
        noted: Any = self.environment
        start = len("".join(noted.parts))
        noted.spans.append((start, start + len(text)))
        return text


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with _")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def compiled(source: str) -> tuple[Any, jinja2.Template]:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": Namespace,
    }
    return environment, environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Render a template: (text, spans of it inside `generation` tags)."""
    environment, template = compiled(source)
    environment.parts.clear()
    environment.spans.clear()
    size = 0
    for part in template.generate(**variables):
        environment.parts.append(part)
        size += len(part)
        if size > RENDERED:
            raise jinja2.TemplateError(f"makes a chat of more than {RENDERED} characters")
    return "".join(environment.parts), list(environment.spans)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render a request. For a request without variables, only check that its source is
    a template."""
    try:
        if "variables" not in request:
            compiled(request["source"])
            return {}
        text, spans = render(request["source"], request["variables"])
        return {"text": text, "spans": spans}
    except MemoryError:
        return {"error": "takes too much memory", "ends": True}
    except RecursionError:
        return {"error": "recurses endlessly", "ends": True}
    except Exception as error:  # templates may raise anything; always answer
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def main() -> None:
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0)):
        hard = resource.getrlimit(limit)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
