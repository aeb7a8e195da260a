//! Arguments of operations: put into a call from decorated tensors, made again from the tensors below when it runs.

use burn_fusion::{Fusion, FusionBackend};

use super::call::{Call, Taken};
use crate::KernelBackend;
use crate::attention::AttentionArgs;
use crate::causal_conv1d::ConvArgs;
use crate::glu::GluArgs;
use crate::norm_residual::{ResidualNormArgs, ResidualNormKept};
use crate::rms_norm_gated::NormArgs;
use crate::rotary::RotaryArgs;
use crate::selective_scan::ScanArgs;
use crate::ssd::SsdArgs;

/// Makes, of an operation's arguments on decorated tensors, those on the tensors below when it runs.
macro_rules! arguments {
    ($name:ident, $args:ident { $($required:ident),* ; $($optional:ident),* ; $($segments:ident)? ; $($value:ident),* }) => {
        pub(super) fn $name<B: FusionBackend + KernelBackend>(
            call: &mut Call<B>,
            args: $args<Fusion<B>>,
        ) -> impl Fn(&mut Taken<B>) -> $args<B> + Send + Sync + 'static {
            $(let $required = call.float(args.$required);)*
            $(let $optional = call.maybe(args.$optional);)*
            $(let $segments = call.segments(args.$segments);)?
            $(let $value = args.$value;)*
            move |taken| $args {
                $($required: taken.float($required),)*
                $($optional: taken.maybe($optional),)*
                $($segments: taken.segments(&$segments),)?
                $($value,)*
            }
        }
    };
}

arguments!(conv_args, ConvArgs { x, weight; bias, state; segments; silu });
arguments!(scan_args, ScanArgs { u, delta, a, b, c; d, z, delta_bias, state; segments; delta_softplus });
arguments!(ssd_args, SsdArgs { x, dt, a, b, c; d, dt_bias, state; segments; options });
arguments!(norm_args, NormArgs { y, weight; z; ; groups, eps });
arguments!(rotary_args, RotaryArgs { x, cos, sin; ; ; });
arguments!(glu_args, GluArgs { up; gate; ; activation });
arguments!(residual_args, ResidualNormArgs { residual, weight; x, bias; ; eps });
arguments!(residual_kept, ResidualNormKept { sum, weight; ; ; bias, eps, dtype });

pub(super) fn attention_args<B: FusionBackend + KernelBackend>(
    call: &mut Call<B>,
    args: AttentionArgs<Fusion<B>>,
) -> impl Fn(&mut Taken<B>) -> AttentionArgs<B> + Send + Sync + 'static {
    let (q, k, v) = (call.float(args.q), call.float(args.k), call.float(args.v));
    let (scale, mask) = (args.scale, args.mask.on::<B>());
    move |taken| AttentionArgs { q: taken.float(q), k: taken.float(k), v: taken.float(v), scale, mask: mask.clone() }
}
