"""The page at /: a chat that shows what speculation does."""
