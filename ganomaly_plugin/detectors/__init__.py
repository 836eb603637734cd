"""One file a method. Each holds a recipe (trained by `ganomaly_plugin.training`) or a whole detector."""
