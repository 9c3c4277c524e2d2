"""Invalid config files and overrides: one line that gives the location."""

import subprocess
import sys

import pytest

from btx_jax.backends.jobs import load_pipeline
from btx_jax.errors import ConfigError
from btx_jax.presets.config_file import read_config

MADE = "from btx_jax.config.config import *\nfrom ml_collections import ConfigDict\n"
SEED = (
    "from btx_jax.presets import recipes\nfrom ml_collections import ConfigDict, config_dict\n"
    "from btx_jax.config.config_dict import to_config_dict\n"
    "def get_config():\n    c = to_config_dict(recipes.seed('tiny'))\n    c.unlock()\n"
)
FILES = [
    ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
    ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n    return open('/nowhere')\n", "line 2: FileNotFoundError: "),
    ("def get_config():\n    return len(3)\n", "line 2: TypeError: object of type 'int' has no"),
    ("def get_config():\n    return get_config()\n", "line 2: RecursionError: maximum recursion"),
    ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
    ("raise BaseException('x')\n", "line 1: BaseException: x"),
    ("def get_config():\n    raise GeneratorExit\n", "line 2: GeneratorExit"),
    (
        "class Odd(Exception):\n    def __str__(self):\n        return 1 / 0\n\nraise Odd\n",
        "line 5: Odd",
    ),
    (
        SEED + "    c.init = config_dict.required_placeholder(str)\n    return c\n",
        "config.init: a required_placeholder without a value; set it in the file",
    ),
    (SEED + "    c.within = c\n    return c\n", "nested too deeply or contains itself"),
    (SEED + "    c.x = [c]\n    return c\n", "nested too deeply or contains itself"),
    (
        SEED + "    for _ in range(300):\n        c = ConfigDict({'a': c})\n    return c\n",
        "nested too deeply or contains itself",
    ),
    ("raise KeyError\n", "line 1: KeyError"),
    ("x = 1\n", "has no function get_config"),
    ("get_config = 3\n", "has no function get_config"),
    ("def get_config():\n    pass\n", "get_config returns NoneType, not a Config or"),
    (
        "def get_config():\n    return {'stage': 'mix'}\n",
        "get_config returns dict, not a Config or",
    ),
    (
        "def get_config(a):\n    return a\n",
        "argument of get_config: needs an argument; write FILE:ARGUMENT",
    ),
    (
        "from btx_jax.presets import recipes\ndef get_config():\n    c = recipes.seed('tiny')\n"
        "    c.train.steps = 5\n    return c\n",
        "line 4: FrozenInstanceError: cannot assign to field 'steps' of a Config; change its"
        " to_config_dict(...) and return that",
    ),
    (
        MADE + "def get_config():\n    return MixConfig('a')\n",
        "line 4: experts='a': must be a list",
    ),
    (
        MADE + "def get_config():\n    return ConfigDict({'stage': 'mix', 'mesh': {'data': 0}})\n",
        "2 mistakes: (1) config.mesh.data=0: must be at least 1, or -1 (2) config.mix: missing",
    ),
    (b"\0\1\2", "SyntaxError: source code string cannot contain null bytes"),
    (b"x = '\xe9'\n", "SyntaxError: "),
    ("#" * 2_000_000, "2000000 bytes; too large for a config file; name another"),
]


@pytest.mark.parametrize(("text", "told"), FILES, ids=[told[:40] for _, told in FILES])
@pytest.mark.parametrize("read", [read_config, load_pipeline])
def test_a_file_that_is_no_config(tmp_path, text, told, read):
    file = tmp_path / "mine.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read(str(file))
    line = str(error.value)
    assert told in line and "\n" not in line and "Traceback" not in line and len(line) < 400
    if not told.startswith("2 mistakes"):
        assert line.startswith("--config: " if read is read_config else "--pipeline: ")
        assert str(file) in line


def test_ctrl_c_while_a_file_is_read_is_no_mistake_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        read_config(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    "text",
    [
        "raise BaseException('x')\n",
        "import sys\nsys.exit(0)\n",
        SEED + "    c.init = config_dict.required_placeholder(str)\n    return c\n",
        SEED + "    c.x = c\n    return c\n",
    ],
)
def test_the_command_tells_it_in_one_line(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, "-m", "btx_jax.launch", f"--config={tmp_path / 'mine.py'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("btx_jax: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("/tmp", "--config: /tmp is a directory"),
        ("/dev/zero", "--config: no file /dev/zero"),
        ("/nowhere.py:tiny", "--config: no file /nowhere.py"),
        ("", "--config='': names no file"),
        (":tiny", "--config=':tiny': names no file"),
        ("a" * 5000, "File name too long"),
        ("configs/demo.py:x", "argument of get_config: takes no argument"),
        ("configs/seed.py:huge", "--config: configs/seed.py: huge: no such size"),
    ],
    ids=lambda x: x[:30],
)
def test_a_name_that_is_no_config_file(file, told):
    with pytest.raises(ConfigError) as error:
        read_config(file)
    assert told in str(error.value) and len(str(error.value)) < 400


def test_all_wrong_overrides_are_told_at_once_with_what_they_would_make():
    overrides = (
        "--config.train.stepz=5",
        "--config.mix.k=3",
        "--config.train.steps=many",
        "--config.train.batch_size=0",
        "--config.train.steps.x=1",
        "--config.compute.dtype",
        "float16",
        "--config.train.accumulate=2",
    )
    with pytest.raises(ConfigError) as error:
        read_config("configs/seed.py:tiny", overrides)
    found = error.value.args
    assert found[0].startswith('config.train.stepz: unknown key; Did you mean "steps"')
    assert found[1].startswith("config.mix.k: unknown key; known: stage, init")
    assert found[2].startswith("config.train.steps=many: ")
    assert (
        found[3] == "config.train.steps.x: unknown key; there are no keys below config.train.steps"
    )
    assert found[4].startswith("config.compute.dtype='float16': did you mean 'bfloat16'?")
    assert found[5] == "config.train.batch_size=0: must be at least 1"
    assert len(found) == 6


def test_what_is_right_is_read_with_its_overrides():
    overrides = ("--config.train.steps=50", "--config.init", "runs/a", "--noconfig.model.tied_head")
    config = read_config("configs/seed.py:tiny", overrides)
    assert (config.train.steps, config.init, config.model.tied_head) == (50, "runs/a", False)
    assert len(load_pipeline("configs/btx.py:tiny", ("--config.rng_seed=3",)).pipeline) > 3


@pytest.mark.parametrize(
    "lines",
    [
        "return dataclasses.replace(c, train=dataclasses.replace(c.train, steps=50))",
        "c = to_config_dict(c)\n    c.train.steps = 50\n    return c",
        "c = to_config_dict(from_config_dict(c))\n    c.train.steps = 50\n    return c",
    ],
    ids=["Config", "ConfigDict", "presets_gave_ConfigDicts_once"],
)
def test_a_file_returns_a_config_or_what_is_made_of_one_and_changed(tmp_path, lines):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom btx_jax.config.config_dict import *\n"
        "from btx_jax.presets import recipes\n"
        f"def get_config(size):\n    c = recipes.seed(size)\n    {lines}\n"
    )
    config = read_config(f"{file}:tiny", ("--config.train.batch_size=4", "--config.init=x"))
    assert (config.train.steps, config.train.batch_size, config.init) == (50, 4, "x")
    with pytest.raises(ConfigError, match='stepz: unknown key; Did you mean "steps"'):
        read_config(f"{file}:tiny", ("--config.train.stepz=4",))
