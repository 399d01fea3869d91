"""Pictures of what a trained backbone sees; one file per kind, see `kinds.KINDS`."""
