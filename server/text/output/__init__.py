"""Token ids to the text of one choice, as they come."""
