// swift-tools-version: 6.2
import PackageDescription

/// House settings: Swift 6 language mode comes with the tools version; any warning is an error.
let house: [SwiftSetting] = [
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .treatAllWarnings(as: .error),
]

let log = Target.Dependency.product(name: "Logging", package: "swift-log")
let arguments = Target.Dependency.product(name: "ArgumentParser", package: "swift-argument-parser")

let package = Package(
  name: "vxd",
  products: [
    .executable(name: "vxd", targets: ["vxd"]),
    .executable(name: "vxctl", targets: ["vxctl"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", exact: "1.8.2"),
    .package(url: "https://github.com/apple/swift-log", exact: "1.16.2"),
  ],
  targets: [
    // C libraries and shims. Only the targets named in ARCHITECTURE.md import them.
    .systemLibrary(name: "CXen", path: "Sources/Backends/CModules/CXen"),
    .systemLibrary(name: "CAIO", path: "Sources/Backends/CModules/CAIO"),
    .target(name: "CLinux", path: "Sources/Backends/CModules/CLinux"),
    .systemLibrary(name: "CJSON", path: "Sources/ControlAPI/CModules/CJSON"),
    .systemLibrary(name: "CSystemd", path: "Sources/Supervisor/CModules/CSystemd"),

    // The data path, one target per stage: the compiler keeps the arrows.
    .target(name: "HostMemory", path: "Sources/Backends/HostMemory", swiftSettings: house),
    .target(
      name: "Virtqueue", dependencies: ["HostMemory"], path: "Sources/Backends/Virtqueue", swiftSettings: house),
    .target(name: "Transport", dependencies: ["Virtqueue"], path: "Sources/Backends/Transport", swiftSettings: house),
    .target(
      name: "Devices", dependencies: ["Virtqueue", "Transport", "HostMemory", "Lifecycle", "CLinux"],
      path: "Sources/Backends/Devices",
      swiftSettings: house),
    .target(name: "EventLoop", dependencies: ["CLinux"], path: "Sources/Backends/EventLoop", swiftSettings: house),
    // The frames between a console port and vxctl.
    .target(name: "ConsoleLink", path: "Sources/Backends/ConsoleLink", swiftSettings: house),
    .target(
      name: "Engines",
      dependencies: ["Devices", "EventLoop", "ConsoleLink", "Virtqueue", "HostMemory", "CAIO", "CLinux"],
      path: "Sources/Backends/Engines",
      swiftSettings: house),
    .target(
      name: "Xen", dependencies: ["Virtqueue", "Transport", "EventLoop", "CXen", "CLinux"],
      path: "Sources/Backends/Xen", swiftSettings: house),
    .target(
      name: "DeviceHost",
      dependencies: [
        "Virtqueue", "Transport", "Devices", "EventLoop", "Engines", "Xen", "Lifecycle", "JSON", "HostMemory",
      ],
      path: "Sources/Backends/DeviceHost", swiftSettings: house),

    // An in-process Xen with guests that play the virtio driver's side.
    .target(
      name: "SimulatedXen",
      dependencies: ["Virtqueue", "Devices", "Transport", "EventLoop", "Xen", "ControlAPI", "CLinux"],
      swiftSettings: house),

    // The control plane. What a guest and a device go through, as values: depends on nothing.
    .target(name: "Lifecycle", swiftSettings: house),
    // JSON values: options of devices are such, and what is said on the control socket.
    .target(name: "JSON", path: "Sources/ControlAPI/JSON", swiftSettings: house),
    .target(
      name: "ControlAPI", dependencies: ["JSON", "EventLoop", "CJSON", "CLinux"], exclude: ["CModules", "JSON"],
      swiftSettings: house),
    .target(
      name: "Supervisor",
      dependencies: [
        "DeviceHost", "Devices", "Engines", "Transport", "Virtqueue", "Xen", "EventLoop", "ControlAPI", "JSON",
        "Lifecycle",
        "CSystemd", "CLinux", log,
      ],
      exclude: ["CModules"], swiftSettings: house),

    .executableTarget(
      name: "vxd",
      dependencies: ["Supervisor", "DeviceHost", "SimulatedXen", "ControlAPI", "EventLoop", "Xen", "CLinux", log],
      swiftSettings: house),
    .executableTarget(
      name: "vxctl", dependencies: ["ControlAPI", "ConsoleLink", "EventLoop", "Xen", "CLinux", arguments],
      swiftSettings: house),
    .executableTarget(
      name: "vxd-bench",
      dependencies: [
        "DeviceHost", "Devices", "Engines", "Lifecycle", "SimulatedXen", "EventLoop", "Xen", "Virtqueue", "CAIO",
        "CLinux",
      ],
      path: "Benchmarks", exclude: ["compare", "profile", "counts"], swiftSettings: house),

    .target(name: "CThreadSanitizer", path: "Tests/CThreadSanitizer"),
    .target(name: "CStoreTrace", path: "Tests/CStoreTrace"),
    .target(
      name: "TestSupport",
      dependencies: [
        "DeviceHost", "Virtqueue", "Transport", "Devices", "Engines", "EventLoop", "SimulatedXen", "Xen",
        "CThreadSanitizer",
      ],
      path: "Tests/TestSupport", swiftSettings: house),
    .testTarget(
      name: "VirtqueueTests", dependencies: ["Virtqueue", "TestSupport", "SimulatedXen", "Xen", "CStoreTrace"],
      swiftSettings: house),
    .testTarget(name: "TransportTests", dependencies: ["Transport", "TestSupport"], swiftSettings: house),
    .testTarget(
      name: "BackendsTests",
      dependencies: [
        "DeviceHost", "Engines", "Devices", "Lifecycle", "Transport", "Virtqueue", "EventLoop", "Xen", "TestSupport",
        "SimulatedXen",
        "Supervisor", "ConsoleLink", "CLinux",
      ],
      swiftSettings: house),
    .testTarget(
      name: "EnginesTests", dependencies: ["Engines", "Devices", "EventLoop", "TestSupport", "CLinux"],
      swiftSettings: house
    ),
    .testTarget(
      name: "XenTests", dependencies: ["Xen", "SimulatedXen", "TestSupport", "Virtqueue", "Transport", "EventLoop"],
      swiftSettings: house),
    .testTarget(
      name: "ControlAPITests", dependencies: ["ControlAPI", "EventLoop", "TestSupport"], swiftSettings: house),
    .testTarget(
      name: "SupervisorTests",
      dependencies: [
        "Supervisor", "SimulatedXen", "Xen", "DeviceHost", "Devices", "ControlAPI", "JSON", "EventLoop", "Lifecycle",
        "Transport",
        "Virtqueue", "TestSupport", "CLinux", log, "vxd", "vxctl",
      ],
      swiftSettings: house),
    .testTarget(name: "LifecycleTests", dependencies: ["Lifecycle"], swiftSettings: house),
    .testTarget(name: "HouseTests", dependencies: ["TestSupport"], swiftSettings: house),
  ]
)

// Fuzz targets have libFuzzer's main, so they are built only where that is linked: see Tests/Fuzz/run.
if Context.environment["VXD_FUZZ"] != nil {
  package.targets.append(
    .executableTarget(
      name: "vxd-fuzz",
      dependencies: [
        "DeviceHost", "Devices", "Engines", "Transport", "Virtqueue", "EventLoop", "Xen", "SimulatedXen", "Supervisor",
        "ControlAPI", "Lifecycle", "TestSupport",
      ],
      path: "Tests/Fuzz", exclude: ["run", "coverage", "corpus"], swiftSettings: house))
}

// Under ThreadSanitizer the programs that tests start have to know the standard library's locks, as the tests do: see Tests/run-unit-tests.
if Context.environment["VXD_THREAD_SANITIZER"] != nil {
  for target in package.targets where ["vxd", "vxctl"].contains(target.name) {
    target.dependencies.append("CThreadSanitizer")
  }
}
