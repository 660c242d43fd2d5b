"""Tests of server/http/admission."""
