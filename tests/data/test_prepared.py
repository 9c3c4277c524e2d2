"""Rows as stored on disk."""

import numpy as np
import pytest
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.proto import tf_example_pb2

from btx_jax.data.prepared import PackedText, Serializer


@pytest.mark.parametrize("largest", [1, 127, 128, 300, 2**17, 2**31 - 1])
@pytest.mark.parametrize("length", [2, 127, 128, 5000])
def test_a_row_is_the_example_that_tfds_makes_of_it(length, largest, tmp_path):
    rng = np.random.default_rng(0)
    row = {
        "tokens": rng.integers(0, largest, length, np.int32, endpoint=True),
        "segments": rng.integers(-largest if length == 128 else 0, 5, length, np.int32),
        "bytes": np.array(largest, np.int32),
    }
    features = PackedText({}, length - 1, data_dir=str(tmp_path)).info.features
    encoded = features.encode_example(row)
    theirs = example_serializer.ExampleSerializer(features.get_serialized_info())
    ours = Serializer({}).serialize_example(encoded)
    assert ours == theirs.get_tf_example(encoded).SerializeToString(deterministic=True)
    assert len(ours) == len(theirs.serialize_example(encoded))
    read = tf_example_pb2.Example.FromString(ours).features.feature
    assert set(read) == set(row)
    for name, values in row.items():
        np.testing.assert_array_equal(read[name].int64_list.value, np.ravel(values))
