"""The public Python interface, which `trainer` re-exports; docs/library.md."""
