"""The process that holds models: takes tickets, feeds engines, loads and unloads."""
