"""The ranks of an engine: what each holds, their processes, where they meet."""
