"""The distillation loss and how it balances the teachers."""
