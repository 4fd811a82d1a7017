//! What a run regresses: targets with the teacher that some of them need.

use super::cache::{Kept, Shown};
use super::teacher::{TeacherArgs, Wanted, check_sees};
use crate::device::{Device, Named, Precision};
use crate::error::{Error, Result};
use crate::methods::target::{Kind, Targets, features};
use crate::nn::vit::VitConfig;

/// What was typed of it.
pub struct Targeted<'a> {
    pub kind: Kind,
    pub eps: f64,
    pub teacher: &'a TeacherArgs,
}

impl Targeted<'_> {
    /// Refuses a teacher where none is asked, and a target that the device has not, before anything is opened.
    pub fn check(&self, encoder: &VitConfig, device: Named) -> Result<()> {
        if self.kind == Kind::Teacher {
            return self.teacher.config(Wanted::Encoder).map(|_| ());
        }
        let t = self.teacher;
        let flags = [
            ("--teacher-path", t.teacher_path.is_some()),
            ("--teacher-model", t.teacher_model.is_some()),
            ("--teacher-ema", t.teacher_ema),
            ("--teacher-cache", t.teacher_cache.is_some()),
        ];
        if let Some((flag, _)) = flags.iter().find(|(_, typed)| *typed) {
            return Err(Error::usage(format!(
                "{flag}: a teacher is asked with --pred-type teacher alone; give that too, or leave the flag out"
            )));
        }
        let gradients = matches!(self.kind, Kind::Hog | Kind::HogMaskfeat);
        if gradients && device != Named::Cpu && !matches!(encoder.patch, 8 | 16) {
            return Err(Error::usage(format!(
                "--device {device}: a GPU computes the gradients of patches of 8 and 16 pixels, not of {}; give --device cpu or another --pred-type",
                encoder.patch
            )));
        }
        Ok(())
    }

    /// The targets of this encoder's patches, for someone to whom images are shown so, where answers may be kept.
    pub fn open(
        &self,
        encoder: &VitConfig,
        (device, precision): (&Device, Precision),
        shown: Option<&Shown>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Targets> {
        if self.kind != Kind::Teacher {
            return Targets::new(self.kind, encoder, self.eps, None);
        }
        let mut teacher = self.teacher.open(Wanted::Encoder, device, precision, say)?;
        check_sees(&teacher, encoder, true)?;
        let depth = teacher.vit().depth;
        say(&format!(
            "the teacher is asked for the tokens of its last block, {depth}, each normalised; no pictures are drawn of such targets"
        ));
        if let Some(shown) = shown {
            self.teacher.remember(&mut teacher, Kept { what: "normalised tokens", block: Some(depth) }, shown, features, say)?;
        }
        Targets::new(self.kind, encoder, self.eps, Some(teacher))
    }
}
