"""Comparing recipes: cells of a study trained and measured one by one, and what can be said of them together.

STUDY.toml ─► design ─► cell, cell, cell … ─► results ─► tables ─► report.html, episodes.parquet, episodes.csv
                        each in a folder of its own, never repeated once finished
"""
