"""Records as text for people: pure functions of records and a `View`."""
