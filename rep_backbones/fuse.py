import copy
from torch import nn
from rep_backbones.containers import Block
def _conv(b):
    c=[m for m in b.modules() if isinstance(m,nn.Conv2d)]
    c=max(c,key=lambda m:m.kernel_size[0])
    return nn.Conv2d(c.in_channels,c.out_channels,c.kernel_size,c.stride,c.padding,c.dilation,c.groups)
def _fuse(m):
    for n,c in m.named_children():
        if isinstance(c,Block):
            kids=list(c.named_children())
            seq=nn.Sequential(_conv(kids[0][1]),*[k for _,k in kids[1:]])
            for a in ("i","f","type","np"):
                if a in c.__dict__: seq.__dict__[a]=c.__dict__[a]
            m._modules[n]=seq
        else: _fuse(c)
    return m
def fuse(model,**k): return _fuse(copy.deepcopy(model)).eval()
