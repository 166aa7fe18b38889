"""From text to token shards, and from shards to the sequences of a training step."""
