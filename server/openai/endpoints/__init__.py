"""One module for each path of the API. /v1/responses has a room of its own."""
