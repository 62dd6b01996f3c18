"""``taskrun serve``: a coordinator that stays, and whose runs share its slots and nodes."""
