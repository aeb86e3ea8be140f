"""Processes of our own programs: started anew, or forked where many start on one machine."""
