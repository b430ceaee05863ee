import os, sys, math, torch
import train, recipe, optim
idea=os.environ.get('IDEA',''); 
Run=train.Run
if 'ema' in idea:
    beta=float(os.environ.get('BETA','0.99')); start=float(os.environ.get('FROM','0.6'))
    old=Run.train_step
    def step(self):
        r=old(self)
        ps=list(self.model.parameters())
        if self.step>=start*self.config.max_steps:
            if not hasattr(self,'ema'): self.ema=[p.detach().clone() for p in ps]
            torch._foreach_lerp_(self.ema,[p.detach() for p in ps],1-beta)
        return r
    Run.train_step=step
    oldf=Run.full_loss
    def full(self):
        ps=list(self.model.parameters()); keep=[p.detach().clone() for p in ps]
        plain=oldf(self)
        if hasattr(self,'ema'):
            with torch.no_grad():
                for p,e in zip(ps,self.ema): p.copy_(e)
            ema=oldf(self)
            with torch.no_grad():
                for p,e in zip(ps,keep): p.copy_(e)
            f=self.meta["val_tokens"]/self.meta["val_bytes"]/math.log(2)
            print('EMA plain',plain*f,'ema',ema*f,flush=True)
        return plain
    Run.full_loss=full
if 'cautious' in idea:
    wd=float(os.environ.get('WD','0.1'))
    def update(self, group, params, grads, states):
        buffers = optim.state_tensors(params, states, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"]); torch._foreach_add_(buffers, grads)
        ahead = torch._foreach_add(grads, buffers, alpha=group["momentum"])
        same={}
        for p,u in zip(params,ahead): same.setdefault(p.shape,[]).append((p,u))
        for shape,pairs in same.items():
            scale=max(1.0,shape[-2]/shape[-1])**0.5
            up=optim.orthogonalize(torch.stack([u for _,u in pairs]),group["ns_steps"]).float()
            for (p,_),u in zip(pairs,up):
                p.sub_(group["lr"]*wd*p*(p*u>0)*(group["lr"]/group["peak_lr"]))
                p.sub_(group["lr"]*scale*u)
    optim.Muon.update=update
if 'grow' in idea:
    plan=eval(os.environ['PLAN'])   # [(share of sequences, size)]
    old=recipe.Loader.next
    def nxt(self):
        total=int(os.environ['TOTAL']); done=self.position/total; acc=0
        for share,size in plan:
            acc+=share
            if done<acc: break
        self.sequences=size
        return old(self)
    recipe.Loader.next=nxt
if 'short' in idea:
    pass
train.run_command_line(sys.argv[1:])
