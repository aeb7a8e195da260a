use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::attention::{AttentionArgs, AttentionGrads, AttentionMask, SlotIds};
use crate::measure::data::{Deviation, Documents, Source, host, width};
use crate::measure::truth::attention::{Problem, run};
use crate::{KernelBackend, Op};

/// Causal attention; with one query the decoding step.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct Attention {
    pub b: usize,
    /// Queries.
    pub l: usize,
    /// Slots.
    pub s: usize,
    /// Query heads.
    pub h: usize,
    /// Key heads.
    pub g: usize,
    pub p: usize,
    pub dtype: DType,
    pub documents: Documents,
}

type Saved<B> = Option<(Tensor<B, 4>, Tensor<B, 3>)>;

fn saving<B: KernelBackend>(args: AttentionArgs<B>) -> Saved<B> {
    let (out, sums) = B::attention_saving(args);
    sums.map(|sums| (out, sums))
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: AttentionArgs<B>,
    dout: Tensor<B, 4>,
    /// Output and log-sum-exps, once a backward pass has asked for them.
    saved: Option<Saved<B>>,
}

impl Attention {
    fn ids(&self) -> Option<Vec<i32>> {
        // Documents of a third of a row and a bit.
        (self.documents != Documents::One).then(|| (0..self.b * self.l).map(|i| ((i % self.l) * 3 / (self.l + 2)) as i32).collect())
    }
}

impl<B: KernelBackend> Subject<B> for Attention {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        if self.l < self.s { "attention_step" } else { "attention" }
    }

    fn kernel(&self) -> Op {
        Op::Attention
    }

    fn shape(&self) -> String {
        let Self { b, l, s, h, g, p, .. } = *self;
        let slots = if l < s { format!(" s={s}") } else { String::new() };
        format!("b={b} l={l}{slots} h={h} g={g} p={p}{}", self.documents.suffix())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let [b, l, s, h, g, p] = [self.b, self.l, self.s, self.h, self.g, self.p].map(|v| v as f64);
        let size = width(self.dtype) as f64;
        let (q, kv) = (b * h * l * p * size, 2.0 * b * g * s * p * size);
        let flop = 4.0 * b * h * l * p * if self.l == self.s { s / 2.0 } else { s };
        let forward = Work { bytes: 2.0 * q + kv, flop };
        let backward = Work { bytes: 3.0 * q + 2.0 * kv, flop: 2.5 * flop };
        Cost { forward, backward: (self.l == self.s).then_some(backward) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let Self { b, l, s, h, g, p, .. } = *self;
        let mask = match self.ids() {
            None => AttentionMask::causal(l, s),
            Some(ids) => AttentionMask::documents(l, s, SlotIds { batch: b, queries: ids.clone(), slots: ids })
                .unwrap_or_else(|error| panic!("{error}")),
        };
        let args = AttentionArgs {
            q: source.normal([b, h, l, p]),
            k: source.normal([b, g, s, p]),
            v: source.normal([b, g, s, p]),
            scale: 1.0 / (p as f32).sqrt(),
            mask,
        };
        Set { args, dout: source.normal([b, h, l, p]), saved: None }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(<B as KernelBackend>::attention(set.args.clone()));
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        // What a training step keeps is made once: it belongs to the forward pass.
        let saved = set.saved.get_or_insert_with(|| saving(set.args.clone())).clone();
        B::attention_backward(set.args.clone(), saved, set.dout.clone()).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, s, h, g, p, .. } = *self;
        // The last row: as many of its last queries, and then of its last heads, as `work` allows.
        let row = b - 1;
        let from = l - (work / (2 * s * p)).clamp(1, l);
        let heads = h - (work / (2 * s * p * (l - from))).clamp(1, h)..h;
        let ratio = h / g;
        let groups = heads.start / ratio..g;
        let Set { args, dout, .. } = self.set(source);
        let dout = source.only(dout, [row..b, heads.clone(), from..l, 0..p]);

        let queries = |t: &Tensor<B, 4>| host(t, [row..b, heads.clone(), from..l, 0..p]);
        let slots = |t: &Tensor<B, 4>| host(t, [row..b, groups.clone(), 0..s, 0..p]);
        let ids = self.ids().map(|ids| ids[row * l..].to_vec()).unwrap_or_default();
        let problem = Problem {
            h: h - heads.start,
            g: g - groups.start,
            t: l - from,
            s,
            p,
            scale: f64::from(args.scale),
            seen: s - l + from + 1,
            group: heads.clone().map(|head| head / ratio - groups.start).collect(),
            q: queries(&args.q),
            k: slots(&args.k),
            v: slots(&args.v),
            query_ids: ids.get(from..).unwrap_or_default().to_vec(),
            slot_ids: ids,
        };
        let out = queries(&<B as KernelBackend>::attention(args.clone()));
        let cotangent = queries(&dout);
        let grads = if backward && l == s { B::attention_backward(args.clone(), saving(args), dout) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&cotangent));

        let mut found = vec![Deviation::new("out", &out, &truth.out)];
        let Some(AttentionGrads { q, k, v }) = grads else { return found };
        found.push(Deviation::new("dq", &queries(&q), &truth.dq));
        found.push(Deviation::new("dk", &slots(&k), &truth.dk));
        found.push(Deviation::new("dv", &slots(&v), &truth.dv));
        found
    }
}
