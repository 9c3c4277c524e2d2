"""Run the real command line in subprocesses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from tests.conftest import ROOT, XLA_FLAGS, sentences

SMALL = (
    "--config.model.vocab_size=320",
    "--config.model.layers=2",
    "--config.model.d_model=32",
    "--config.model.d_ff=64",
    "--config.model.heads=2",
    "--config.model.kv_heads=2",
    "--config.model.head_dim=16",
    "--config.data.sequence_length=64",
    "--config.train.warmup_steps=2",
    "--config.train.eval_every=0",
)


def heed_ctrl_c():
    """Restore Ctrl-C: a shell's background jobs ignore it, and so would the processes they
    start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class CLI:
    def __init__(self, tmp_path, tokenizer_file):
        self.home = tmp_path
        self.text = tmp_path / "text.jsonl"
        self.text.write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in sentences(200, seed=1))
        )
        self.tokenizer = tokenizer_file
        self.environment = dict(os.environ)

    def start(self, *arguments, module="btx_jax.launch"):
        command = [sys.executable, "-m", module, *map(str, arguments)]
        heed_ctrl_c()
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, module="btx_jax.launch", status=0):
        process = self.start(*arguments, module=module)
        out, error = process.communicate(timeout=300)
        assert process.returncode == status, error[-3000:]
        return out, error

    def seed(self, workdir, *more, steps=60, every=7):
        return (
            "--config=configs/seed.py:tiny", f"--workdir={self.home / workdir}", f"--config.data.train={self.text}",
            f"--config.data.tokenizer={self.tokenizer}", f"--config.data.cache={self.home / 'cache'}", f"--config.train.steps={steps}",
            f"--config.checkpoint.every={every}", *SMALL, *more,
        )  # fmt: skip

    def digest(self, workdir):
        return self.run("digest", self.home / workdir, module="btx_jax")[0].strip()

    def fails(self, *arguments, module="btx_jax.launch"):
        """The single line of an expected error."""
        _, error = self.run(*arguments, module=module, status=2)
        lines = [line for line in error.splitlines() if line.startswith("btx_jax: error:")]
        assert len(lines) == 1, error[-2000:]
        assert "Traceback" not in error
        return lines[0]

    def steps_logged(self, workdir):
        file = self.home / workdir / "metrics.jsonl"
        return (
            [
                json.loads(line)["step"]
                for line in file.read_text().splitlines()
                if line.endswith("}")
            ]
            if file.exists()
            else []
        )

    def wait_for_step(self, workdir, step, process):
        for _ in range(9000):
            if process.poll() is not None or (self.steps_logged(workdir) or [0])[-1] >= step:
                return
            time.sleep(0.02)
        raise AssertionError("no progress in three minutes")

    def start_several(self, count, devices, *arguments, each=None, module="btx_jax.launch"):
        """Start `count` processes of one run on this machine, with `devices` simulated devices
        each. each: further arguments for each process."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        flags = ("--coordinator=" + address, f"--num_processes={count}")
        devices_flag = f"--xla_force_host_platform_device_count={devices}"
        self.environment["XLA_FLAGS"] = f"{XLA_FLAGS} {devices_flag}"
        try:
            return [
                self.start(
                    *arguments,
                    *flags,
                    f"--process_id={number}",
                    *(each[number] if each else ()),
                    module=module,
                )
                for number in range(count)
            ]
        finally:
            self.environment["XLA_FLAGS"] = XLA_FLAGS
