def window_mask(*a,**k): raise NotImplementedError
def block_attention(*a,**k): raise NotImplementedError
