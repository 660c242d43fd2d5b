"""Routes that belong to no API: operators, administrators, documentation."""
