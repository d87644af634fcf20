"""Outcomes, metrics, tables for fitting, and reports."""
