"""The ground floor, on which every other folder stands: errors, files, command lines, devices."""
