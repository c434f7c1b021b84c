"""LoRA and its relatives: read, merge exactly, undo exactly, train, write."""
