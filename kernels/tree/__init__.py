"""Growing, choosing and walking draft trees."""
