"""Tests of server/text/template."""
