from btx_jax.errors import MAX_TOLD, ConfigError


def test_few_mistakes_are_told_one_by_one():
    told = str(ConfigError("config.a: must be 1", "config.b: must be 1"))
    assert told == "2 mistakes: (1) config.a: must be 1 (2) config.b: must be 1"


def test_one_mistake_in_many_places_is_told_once():
    many = [f"config.pipeline.s{i}.config.data: no file matches 'a'" for i in range(MAX_TOLD)]
    told = str(ConfigError(*many, "config.b: must be 1"))
    assert told == (
        f"2 mistakes: (1) config.pipeline.s0.config.data and {MAX_TOLD - 1} more like it: no file"
        " matches 'a' (2) config.b: must be 1"
    )


def test_more_than_anybody_reads_are_counted():
    told = str(ConfigError(*(f"config.a{i}: must be {i}" for i in range(MAX_TOLD + 2))))
    assert told.startswith(f"{MAX_TOLD + 2} mistakes: (1) config.a0: must be 0 (2)")
    assert told.endswith(f"must be {MAX_TOLD - 1} and 2 more")
