//! The globals that a checkpoint may name. None of them is code here.

use crate::bail;
use crate::error::Result;
use crate::formats::{FileDtype, quoted};

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Namespace,
    RebuildTensor,
    RebuildParameter,
    Storage(FileDtype),
}

const STORAGE_CLASSES: [(&str, FileDtype); 10] = [
    ("torch.FloatStorage", FileDtype::F32),
    ("torch.DoubleStorage", FileDtype::F64),
    ("torch.HalfStorage", FileDtype::F16),
    ("torch.BFloat16Storage", FileDtype::BF16),
    ("torch.LongStorage", FileDtype::I64),
    ("torch.IntStorage", FileDtype::I32),
    ("torch.ShortStorage", FileDtype::I16),
    ("torch.CharStorage", FileDtype::I8),
    ("torch.ByteStorage", FileDtype::U8),
    ("torch.BoolStorage", FileDtype::Bool),
];

/// The storage class of a dtype, where PyTorch's classic storages have one.
pub(in crate::formats) fn storage_class(dtype: FileDtype) -> Option<&'static str> {
    STORAGE_CLASSES.iter().find(|(_, of)| *of == dtype).map(|(name, _)| *name)
}

impl Global {
    pub fn find(module: &str, name: &str) -> Result<Self> {
        let full = format!("{module}.{name}");
        match full.as_str() {
            "collections.OrderedDict" => return Ok(Self::OrderedDict),
            "argparse.Namespace" => return Ok(Self::Namespace),
            "torch._utils._rebuild_tensor_v2" => return Ok(Self::RebuildTensor),
            "torch._utils._rebuild_parameter" => return Ok(Self::RebuildParameter),
            _ => {}
        }
        if let Some((_, dtype)) = STORAGE_CLASSES.iter().find(|(class, _)| *class == full) {
            return Ok(Self::Storage(*dtype));
        }
        let advice = match module.split('.').next() {
            Some("pathlib") => "; in PyTorch, turn paths into str and save again",
            Some("numpy") => "; in PyTorch, turn NumPy values into Python numbers or tensors and save again",
            Some("torch") => "; in PyTorch, save tensors of an ordinary dtype in a plain dict",
            _ => "; in PyTorch, save only tensors and plain Python data",
        };
        bail!("the global {} is not one that a checkpoint needs, and nothing was executed{advice}", quoted(&full));
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::OrderedDict => "collections.OrderedDict",
            Self::Namespace => "argparse.Namespace",
            Self::RebuildTensor => "torch._utils._rebuild_tensor_v2",
            Self::RebuildParameter => "torch._utils._rebuild_parameter",
            Self::Storage(dtype) => storage_class(dtype).unwrap_or("torch.Storage"),
        }
    }
}
