package import Devices
package import Engines
package import EventLoop

/// What a running block device has to say to its supervisor.
package enum BlockReport: Sendable {
  /// The guest broke a queue: the device waits for a reset.
  case fault(DeviceFault)
  /// A queue stopped at an error (a negated errno) and waits for an operator's word.
  case held(queue: Int, Int)
  case resumed(queue: Int)
  /// The server of the store is out of reach; requests wait.
  case storeLost(String)
  case storeBack
}

/// Why a backend cannot start.
package enum StartFault: Error {
  case image(ImageFault)
  case host(Errno)

  package var message: String {
    switch self {
    case .image(let fault): fault.message
    case .host(let errno): "cannot start the device's threads: \(errno)"
    }
  }
}
