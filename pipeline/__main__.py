from pipeline.cli import main
from pipeline.exits import leave_with

leave_with(main)
