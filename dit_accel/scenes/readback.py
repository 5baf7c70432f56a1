"""stub"""
attributes = score = None
