VIEWS={}
def multi_branch(m): return []
def equivalent(*a): raise 0
