"""Reading back the data of trackers."""

import struct
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, FILE_HEADER = 32_768, 7, 7  # of LevelDB's log format, which W&B uses


def offline_records(file: Path):
    """Yield the records of an offline W&B run, as its own messages."""
    data, at, whole = file.read_bytes(), FILE_HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # complete, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def finished(file: Path):
    """The records, once W&B's own process has written the last one."""
    for _ in range(300):
        records = list(offline_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file}: not finished in half a minute")


def wandb_rows(file: Path):
    """[(step, {name: JSON text of its value})] in order, merged by step."""
    rows = []
    for record in finished(file):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            rows.append((record.history.step.num, items))
    return rows
