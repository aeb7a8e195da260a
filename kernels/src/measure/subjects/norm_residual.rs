use burn::tensor::{DType, Tensor};

use super::{Cost, Subject, Work};
use crate::measure::data::{Deviation, Source, host, host_all, width};
use crate::measure::truth::rms_norm::{Problem, run};
use crate::norm_residual::{ResidualNormArgs, ResidualNormGrads, ResidualNormKept};
use crate::{KernelBackend, Op};

/// Residual addition, if there is one, and the norm after it.
#[derive(Debug, Clone, Copy)]
pub(in crate::measure) struct ResidualNorm {
    pub b: usize,
    pub l: usize,
    pub d: usize,
    pub dtype: DType,
    /// Type of the residual stream.
    pub residual: DType,
    /// Layer norm.
    pub layer: bool,
    /// There is a branch to add.
    pub added: bool,
}

pub(in crate::measure) struct Set<B: KernelBackend> {
    args: ResidualNormArgs<B>,
    /// What the forward leaves for the backward.
    sum: Tensor<B, 3>,
    dnormed: Tensor<B, 3>,
    dsum: Tensor<B, 3>,
}

impl ResidualNorm {
    fn kept<B: KernelBackend>(&self, set: &Set<B>) -> ResidualNormKept<B> {
        let args = &set.args;
        let bias = args.bias.as_ref().map(Tensor::dtype);
        ResidualNormKept { sum: set.sum.clone(), weight: args.weight.clone(), bias, eps: args.eps, dtype: args.dtype() }
    }
}

impl<B: KernelBackend> Subject<B> for ResidualNorm {
    type Set = Set<B>;

    fn op(&self) -> &'static str {
        "norm_residual"
    }

    fn kernel(&self) -> Op {
        Op::NormResidual
    }

    fn shape(&self) -> String {
        let wide = if self.residual == self.dtype { "" } else { " residual=f32" };
        let [layer, alone] = [(self.layer, " layer"), (!self.added, " alone")].map(|(there, word)| if there { word } else { "" });
        format!("b={} l={} d={}{wide}{layer}{alone}", self.b, self.l, self.d)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn cost(&self) -> Cost {
        let elements = (self.b * self.l * self.d) as f64;
        let (x, residual) = (elements * width(self.dtype) as f64, elements * width(self.residual) as f64);
        // With a branch: it and what is normed, and twice the stream. Without: the stream and what is normed, in its type.
        let [forward, backward] =
            if self.added { [2.0 * x + 2.0 * residual, 2.0 * x + 3.0 * residual] } else { [2.0 * residual, 4.0 * residual] };
        let flop = elements * if self.layer { 8.0 } else { 5.0 };
        Cost { forward: Work { bytes: forward, flop }, backward: Some(Work { bytes: backward, flop: 2.0 * flop }) }
    }

    fn set(&self, source: &Source<B>) -> Set<B> {
        let shape = [self.b, self.l, self.d];
        let stream = |tensor: Tensor<B, 3>| tensor.cast(self.residual);
        let (x, residual) = (self.added.then(|| source.normal(shape)), stream(source.normal32(shape)));
        let sum = match &x {
            Some(x) => residual.clone() + x.clone().cast(self.residual),
            None => residual.clone(),
        };
        let (weight, bias) = (source.uniform32([self.d], 0.5, 1.5), self.layer.then(|| source.uniform32([self.d], -1.0, 1.0)));
        let args = ResidualNormArgs { x, residual, weight, bias, eps: 1e-5 };
        let dnormed = source.normal(shape).cast(args.dtype());
        Set { args, sum, dnormed, dsum: stream(source.normal32(shape)) }
    }

    fn forward(&self, set: &mut Set<B>) {
        drop(B::norm_residual(set.args.clone()));
    }

    fn backward(&self, set: &mut Set<B>) -> bool {
        B::norm_residual_backward(self.kept(set), set.dnormed.clone(), Some(set.dsum.clone())).is_some()
    }

    fn check(&self, source: &Source<B>, backward: bool, work: usize) -> Vec<Deviation> {
        let Self { b, l, d, .. } = *self;
        let (row, first) = (b - 1, l - (work / (32 * d)).clamp(1, l));
        let mut set = self.set(source);
        set.dnormed = source.only(set.dnormed, [row..b, first..l, 0..d]);
        set.dsum = source.only(set.dsum, [row..b, first..l, 0..d]);
        let tokens = |t: &Tensor<B, 3>| host(t, [row..b, first..l, 0..d]);
        let plus = |a: Vec<f64>, b: Vec<f64>| -> Vec<f64> { a.iter().zip(&b).map(|(a, b)| a + b).collect() };
        let mut y = tokens(&set.args.residual);
        if let Some(x) = &set.args.x {
            y = plus(y, tokens(x));
        }
        let (weight, bias) = (host_all(Some(&set.args.weight)), host_all(set.args.bias.as_ref()));
        let problem = Problem { rows: l - first, e: d, groups: 1, eps: f64::from(set.args.eps), y, z: Vec::new(), weight, bias };
        let out = B::norm_residual(set.args.clone());
        let (normed, sum) = (tokens(&out.normed), tokens(&out.sum));
        set.sum = out.sum;
        let (dnormed, dsum) = (tokens(&set.dnormed), tokens(&set.dsum));
        let grads = if backward { B::norm_residual_backward(self.kept(&set), set.dnormed, Some(set.dsum)) } else { None };
        let truth = run(&problem, grads.is_some().then_some(&dnormed));

        let mut found = vec![Deviation::new("normed", &normed, &truth.out), Deviation::new("sum", &sum, &problem.y)];
        let Some(ResidualNormGrads { x, residual, weight, bias }) = grads else { return found };
        let want = plus(truth.dy, dsum);
        found.push(Deviation::new("dx", &tokens(&x), &want));
        found.push(Deviation::new("dresidual", &tokens(&residual), &want));
        found.push(Deviation::new("dweight", &host_all(Some(&weight)), &truth.dweight));
        found.extend(bias.map(|bias| Deviation::new("dbias", &host_all(Some(&bias)), &truth.dbias)));
        found
    }
}
