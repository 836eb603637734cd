"""Where jobs run: one small interface (`ganomaly_plugin.core.Executor`), one implementation a file."""
