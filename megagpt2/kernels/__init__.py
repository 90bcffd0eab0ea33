"""One file per operator: its contract, a reference in plain torch, and its gradient. No ranks in here."""
