"""Decides what happens next. It holds references and small numbers; it does no tensor maths."""
